"""Interleaved timing of networks, detectors, the stages of a network and the loader: `python -m tools.benchmark`."""
