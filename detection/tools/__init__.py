"""Programs for detection; each runs as `python -m detection.tools.<name>`."""
