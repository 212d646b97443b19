"""Rehearsal of a long run: an interrupted run must end bit-identical to an uninterrupted run."""
