"""The gate of accuracy-aware quantization is a statement with its uncertainty."""

import numpy as np
import pytest

from emotion.quantization import accuracy_aware
from emotion.quantization.accuracy_aware import BEYOND, UNDECIDED, WITHIN, AccuracyAwareArguments, compare, judge
from emotion.utils.errors import UserError

LABELS = np.arange(300) % 3
RIGHT = np.eye(3)[LABELS]


def effect_of(*wrong_before, wrong_after):
    """The effect of a file that is wrong on some rows, against FP32 that is wrong on others."""
    before, after = RIGHT.copy(), RIGHT.copy()
    before[list(wrong_before)] = np.roll(RIGHT[list(wrong_before)], 1, axis=1)
    after[wrong_after] = np.roll(RIGHT[wrong_after], 1, axis=1)
    return compare(before, after, LABELS)


@pytest.mark.parametrize(
    ("wrong_before", "wrong_after", "verdict"),
    [
        ((), [], WITHIN),
        ((0, 1), [0, 1], WITHIN),  # the same rows: nothing changed
        ((0, 1, 2), [3, 4, 5], UNDECIDED),  # as many right as before, by chance
        ((), list(range(12)), BEYOND),
    ],
)
def test_a_drop_is_judged_by_its_bound(wrong_before, wrong_after, verdict):
    effect = effect_of(*wrong_before, wrong_after=wrong_after)
    drop, bound = -100 * effect["macro_f1_change"], -100 * effect["macro_f1_change_bound"]
    assert effect["rows"] == 300 and bound >= drop
    assert judge(drop, bound, max_drop=0.5) == verdict


@pytest.mark.parametrize("strict", [False, True])
def test_what_cannot_be_told_is_said_and_strict_refuses_it(strict, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy_aware, "files_to_serve", lambda folder, format: {"onnx": 1})
    arguments = AccuracyAwareArguments(strict=strict)
    effect = effect_of(0, 1, 2, wrong_after=[3, 4, 5])
    attempt = accuracy_aware._report(tmp_path, "onnx", "plain", effect, 1.0, arguments)
    assert "300 texts cannot tell" in capsys.readouterr().out
    if strict:
        with pytest.raises(UserError, match="--max_f1_drop"):
            accuracy_aware._choose("onnx", [attempt], arguments)
    else:
        assert accuracy_aware._choose("onnx", [attempt], arguments) == 0 and attempt["kept"]
