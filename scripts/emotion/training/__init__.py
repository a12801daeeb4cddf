"""The Trainer's callbacks and subclasses, QLoRA."""
