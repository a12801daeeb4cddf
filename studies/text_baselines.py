"""Scores what needs no neural network: TF-IDF with logistic regression, and the most frequent class.

python studies/text_baselines.py
python studies/text_baselines.py --dataset_name my_dataset --results_dir build/results
"""

import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from emotion.data.dataset import DEFAULT_DATASET, get_split, load_task
from emotion.evaluation.protocol import WARMUP_RUNS, choose_timed, measure_quality, summarize_latency
from emotion.utils.arguments import flag, parse_args
from emotion.utils.command import run
from emotion.utils.files import ROOT, write_json
from emotion.utils.machine import describe_run


@dataclass
class BaselineArguments:
    """Which dataset is learned, and where the results go."""

    dataset_name: str = flag(DEFAULT_DATASET, "Hub id, folder or file of the dataset.")
    results_dir: str = flag(str(ROOT / "results"), "Where the results are written.")


def main(argv=None) -> None:
    """Trains on train, scores and times on test, and writes `text_baselines.json`."""
    (args,) = parse_args((BaselineArguments,), positional="dataset_name", argv=argv)
    task = load_task(args.dataset_name)
    train, test = get_split(task, "train"), get_split(task, "test")
    models = {
        # Words and pairs of words; class weights, since the rare classes count in macro F1; of C = 1, 3, 10 and 30 the
        # last scores best on validation.
        "TF-IDF with logistic regression": make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=30, class_weight="balanced", max_iter=1000)
        ),
        "majority class": DummyClassifier(strategy="prior"),
    }
    study = describe_run(threads=1) | {"dataset": task.name, "dataset_source": task.source, "models": {}}
    for name, model in models.items():
        model.fit(train["text"], train["label"])
        study["models"][name] = measure(model, task, test)
        print(f"{name}: macro F1 {study['models'][name]['quality']['macro_f1']:.4f}")
    write_json(Path(args.results_dir) / "text_baselines.json", study)


def measure(model, task, test) -> dict:
    """The scores of a fitted model, the bytes of its pickle, and its latency with single texts."""
    # The logarithms of probabilities serve as logits; at least 1e-12, since a logit is finite.
    logits = np.log(np.maximum(model.predict_proba(test["text"]), 1e-12))
    times = []
    for row in choose_timed(len(test), 500):
        start = time.perf_counter()
        model.predict_proba([test["text"][row]])
        times.append(1000 * (time.perf_counter() - start))
    return {
        "quality": measure_quality(logits, np.asarray(test["label"]), task, test, "test") | {"texts_cut": 0},
        "bytes_to_serve": len(pickle.dumps(model)),
        "latency_ms": summarize_latency(np.array(times[WARMUP_RUNS:])),
    }


if __name__ == "__main__":
    run(main)
