"""Where model and data come from, rows, token ids, scores."""
