"""Datasets, labels, tokenization and metrics."""
