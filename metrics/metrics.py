"""Scores of a classifier as an `evaluate` module: macro F1, accuracy, per-class F1 and the confusion matrix.

Opened by path, so it needs no network: `evaluate.load("metrics").compute(predictions=[0, 2], references=[0, 1])`.
"""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score


class ClassificationScores(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: class indices (int); labels: all class indices, in order",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, labels=None):
        """A class that is neither predicted nor present scores 0, and counts in the mean over ``labels``."""
        scored = {"labels": labels, "zero_division": 0}
        return {
            "macro_f1": float(f1_score(references, predictions, average="macro", **scored)),
            "accuracy": float(accuracy_score(references, predictions)),
            "per_class_f1": f1_score(references, predictions, average=None, **scored).tolist(),
            "confusion_matrix": confusion_matrix(references, predictions, labels=labels).tolist(),
        }
