"""What the commands share. A folder imports only those before it: common, task, model, batch, quantize, measure,
report.

`from emotion import EmotionClassifier` gives the class that answers texts.
"""

import os

# Read by libraries when they load or are called; who has set one of them keeps it. ONNX Runtime's telemetry has a
# thread, for which a forked process would wait at its end. `tokenizers` would take all processors, whatever number of
# threads was asked for; TextEncoder shares the texts among that many.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def __getattr__(name: str):
    # Loaded when it is asked for: every command imports this package, and most must not wait for NumPy.
    if name == "EmotionClassifier":
        from emotion.model.emotion_classifier import EmotionClassifier

        return EmotionClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
