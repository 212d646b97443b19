"""Command-line tools; each runs as `python -m tools.<name>`."""
