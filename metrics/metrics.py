"""Scores of a classifier as an `evaluate` module: macro F1, accuracy, per-class F1 and the confusion matrix.

Where a text may have several labels, predictions and references are lists of 0 and 1, one for each label; accuracy is
the share of texts whose labels are all right, micro F1 is added, and each label has a confusion matrix.

Opened by path, so it needs no network: `evaluate.load("metrics").compute(predictions=[0, 2], references=[0, 1])`.
"""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, multilabel_confusion_matrix


class ClassificationScores(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: class indices (int); labels: all class indices, in order",
            features=[
                datasets.Features({"predictions": kind, "references": kind})
                for kind in (datasets.Value("int64"), datasets.Sequence(datasets.Value("int64")))
            ],
        )

    def _compute(self, predictions, references, labels=None):
        """A class that is neither predicted nor present scores 0, and counts in the mean over ``labels``."""
        scored = {"labels": labels, "zero_division": 0}
        several = np.ndim(references) == 2
        matrix = multilabel_confusion_matrix if several else confusion_matrix
        scores = {
            "macro_f1": float(f1_score(references, predictions, average="macro", **scored)),
            "accuracy": float(accuracy_score(references, predictions)),
            "per_class_f1": f1_score(references, predictions, average=None, **scored).tolist(),
            "confusion_matrix": matrix(references, predictions, labels=labels).tolist(),
        }
        if several:
            scores["micro_f1"] = float(f1_score(references, predictions, average="micro", **scored))
        return scores
