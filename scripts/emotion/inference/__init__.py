"""Model folders, one class per runtime, `EmotionClassifier`, batch jobs."""
