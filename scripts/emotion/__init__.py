"""What the commands share. A folder imports only those before it: common, task, model, batch, quantize, measure,
report.

`from emotion import EmotionClassifier` gives the class that answers texts.
"""


def __getattr__(name: str):
    # Loaded when it is asked for: every command imports this package, and most must not wait for NumPy.
    if name == "EmotionClassifier":
        from emotion.model.emotion_classifier import EmotionClassifier

        return EmotionClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
