"""Errors, recipes and flags, whole files, the machine: what knows nothing of models."""
