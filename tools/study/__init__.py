"""Train variants of a network with several seeds and compare them: `python -m tools.study`."""
