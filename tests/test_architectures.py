"""Models of other architectures, with random weights, trained, and with outliers: each as the documentation names it.

`PYTHONPATH=scripts:studies:tools python tests/test_architectures.py` prints the rows of its table.
"""

import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import run_ptq
from conftest import (
    COLORS,
    OF_DISTILBERT,
    ROOT,
    SIZES,
    build_rows,
    build_tokenizer,
    color_features,
    ptq_flags,
    save_dataset,
)
from emotion import EmotionClassifier
from emotion.inference.model_folder import files_to_serve, find_formats
from emotion.quantization.layers import find_layers
from emotion.quantization.outlier_channels import find_pairs
from emotion.utils.errors import UserError

WITH_POSITIONS = SIZES | {"max_position_embeddings": 42}
WITH_FACTORS = WITH_POSITIONS | {"embedding_size": 32}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 8}
XLNET = {"d_model": 64, "n_layer": 2, "n_head": 2, "d_inner": 128, "initializer_range": 0.2}
FUNNEL = {"d_model": 64, "block_sizes": [1, 1], "n_head": 2, "d_head": 32, "d_inner": 128, "num_decoder_layers": 0}
ARCHITECTURES = {
    "BERT": ("bert", WITH_POSITIONS),
    "DistilBERT": ("distilbert", OF_DISTILBERT),
    "RoBERTa": ("roberta", WITH_POSITIONS),
    "XLM-R": ("xlm-roberta", WITH_POSITIONS),
    "CamemBERT": ("camembert", WITH_POSITIONS),
    "MPNet": ("mpnet", WITH_POSITIONS),
    "ELECTRA": ("electra", WITH_FACTORS),
    "ALBERT": ("albert", WITH_FACTORS),
    "DeBERTa-v2": ("deberta-v2", WITH_POSITIONS | DEBERTA | {"position_biased_input": False, "type_vocab_size": 0}),
    "ModernBERT": ("modernbert", WITH_POSITIONS | {"local_attention": 8}),
    "MobileBERT": ("mobilebert", WITH_FACTORS | {"intra_bottleneck_size": 32, "initializer_range": 0.05}),
    "XLNet": ("xlnet", XLNET),
    "Funnel": ("funnel", FUNNEL | {"initializer_std": 0.2}),
    "Longformer": ("longformer", SIZES | {"max_position_embeddings": 66, "attention_window": 8}),
    "SqueezeBERT": ("squeezebert", WITH_POSITIONS | {"embedding_size": 64}),
    "Qwen2": ("qwen2", WITH_POSITIONS | {"num_key_value_heads": 2}),
    "GPT-2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 42, "initializer_range": 0.2}),
}
WITHOUT_TYPES = {
    "distilbert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "modernbert",
    "gpt2",
    "longformer",
    "qwen2",
}
RATES = {"MobileBERT": 1e-3}  # of learning, where it is not the usual one
FORMATS = ("onnx", "torchao", "openvino")
# Weights -> the share of other labels: the scores of random ones are close to each other
ALLOWED = {"random": 0.1, "trained": 0.01, "outliers": 0.01}


def build_classifier(folder, kind: str, sizes: dict, **changes):
    """A classifier of three colors with random weights, as Transformers saves it."""
    like_xlnet = kind == "xlnet"
    tokenizer = build_tokenizer(
        "$A:0 [SEP]:0 [CLS]:2" if like_xlnet else "[CLS] $A [SEP]",
        model_max_length=40,
        model_input_names=["input_ids", "attention_mask"] + ["token_type_ids"] * (kind not in WITHOUT_TYPES),
        padding_side="left" if like_xlnet else "right",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    labels = dict(enumerate(COLORS))
    # A row more, for the token [MASK], which the tokenizers of Transformers add
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + 1, id2label=labels, **ids, **sizes, **changes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def train_briefly(folder, texts: list[str], labels, rate: float = 5e-3):
    """Trains the classifier of a folder until it knows the texts; labels are int, or float for several each."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=rate), torch.Generator().manual_seed(0)
    known = 0  # batches in a row
    for _ in range(1000):
        rows = torch.randint(len(texts), (32,), generator=draw)
        inputs = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
        loss = model(**inputs, labels=labels[rows]).loss
        loss.backward()
        known = known + 1 if loss < 0.02 else 0
        if known == 20:
            break
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return model


def put_in_outliers(model) -> None:
    """Gives a hidden channel of each feed-forward layer a large activation whose effect the next layer takes back."""
    linear = find_layers(model).linear
    with torch.no_grad():
        for second, first in find_pairs(model, linear).items():
            wide, narrow = model.get_submodule(first), model.get_submodule(second)
            if wide.bias is not None:
                wide.weight[5], wide.bias[5] = 0, 200.0
                narrow.bias -= 200 * narrow.weight[:, 5]
        for name in linear:  # ModernBERT and Qwen2: a factor for each channel
            if name.endswith(("mlp.Wo", "mlp.down_proj")):
                wide = model.get_submodule(name.replace("Wo", "Wi").replace("down", "up"))
                wide.weight[-5] *= 50
                model.get_submodule(name).weight[:, -5] /= 50


def documented() -> dict[str, list[str]]:
    """Architecture -> its outcome in each of `FORMATS`, from the documentation's table."""
    page = (ROOT / "docs" / "quantization.md").read_text()
    section = page.partition("## Architectures\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name: outcomes for name, *outcomes in rows[2:]}


def transformers_logits(folder, texts: list[str]) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def outcomes_of(name: str, weights: str, folder, data, formats=FORMATS) -> list[str]:
    """Quantizes an architecture with such weights; the outcome in each format, with figures on 501 texts."""
    kind, sizes = ARCHITECTURES[name]
    model, rows = build_classifier(folder / "float", kind, sizes), build_rows(500)
    if weights != "random":
        model = train_briefly(folder / "float", rows["text"], torch.tensor(rows["label"]), RATES.get(name, 5e-3))
    if weights == "outliers":
        with contextlib.suppress(UserError):  # a model without linear layers, which is refused below, too
            put_in_outliers(model)
        model.save_pretrained(folder / "float")
    texts = [*rows["text"], " ".join(rows["text"][:30])]
    expected = transformers_logits(folder / "float", texts)
    assert weights == "random" or (expected[:-1].argmax(axis=-1) == rows["label"]).mean() > 0.95
    flags = ptq_flags(folder / "float", folder / "ptq", dataset_name=data, num_calibration_samples=60)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            run_ptq.main([*flags, "--max_f1_drop", "100" if weights == "random" else "0.5", "--formats", *formats])
    except UserError as error:
        return [f"refused: {error}"] * len(formats)
    left_out, outcomes = re.search("left out: .*?; (.*)", shown.getvalue()), []
    for format in formats:
        if format not in find_formats(folder / "ptq"):
            outcomes.append(f"refused: {left_out[1]}")
            continue
        logits = EmotionClassifier.from_pretrained(folder / "ptq", format).logits(texts)
        equal, gap = (logits.argmax(axis=-1) == expected.argmax(axis=-1)).mean(), np.abs(logits - expected).mean()
        size = sum(files_to_serve(folder / "ptq", format).values()) / 1e6
        outcome = "as good as FP32" if equal >= 1 - ALLOWED[weights] else "other labels"
        if format == "onnx":
            graph = onnx.load(folder / "ptq" / "onnx" / "model_quantized.onnx").graph
            fused = {node.op_type for node in graph.node} & {"QAttention", "MultiHeadAttention"}
            outcome += "" if fused else ", plain graph"
        outcomes.append(f"{outcome} ({100 * equal:.1f} %, {gap / expected.std():.3f}, {size:.2f} MB)")
    return outcomes


def test_the_table_names_every_architecture():
    assert list(documented()) == list(ARCHITECTURES)


@pytest.mark.processes
@pytest.mark.parametrize("weights", ALLOWED)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_comes_out_as_documented(name, weights, colors, tmp_path):
    formats = FORMATS if weights == "trained" else FORMATS[:2]  # OpenVINO's takes longer than all the rest
    outcomes = outcomes_of(name, weights, tmp_path, colors, formats)
    for outcome, documentation in zip(outcomes, documented()[name], strict=False):
        begins, _, reason = documentation.partition(" (")[0].partition(": ")
        assert outcome.partition(" (")[0].startswith(begins) and reason in outcome, outcomes


if __name__ == "__main__":  # prints the table
    data = save_dataset(Path(tempfile.mkdtemp()), {"train": build_rows(480), "test": build_rows(90)}, color_features())
    for architecture in sys.argv[1:] or ARCHITECTURES:
        outcomes = outcomes_of(architecture, "trained", Path(tempfile.mkdtemp()), data)
        print(f"| {architecture} | {' | '.join(outcomes)} |", flush=True)
