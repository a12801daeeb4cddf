"""Tables, pages and pictures from the records."""

from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent / "templates"
