"""Export of trained networks, checked against eager execution: `python -m tools.export`."""
