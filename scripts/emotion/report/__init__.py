"""Comparison, tables, pages, cards, figures, trace: what is written from records alone."""
