"""A web page for a trained classifier: `python -m tools.app`."""
