"""Interleaved timing of networks, with a plain matmul as reference: `python -m tools.benchmark`."""
