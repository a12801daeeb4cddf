"""Tables, pages and pictures from the records."""
