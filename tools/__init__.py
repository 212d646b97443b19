"""Programs beside the main job; each runs as `python -m tools.<name>`."""
