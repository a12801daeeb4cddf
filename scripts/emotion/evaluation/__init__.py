"""The evaluation protocol, records and statistics."""
