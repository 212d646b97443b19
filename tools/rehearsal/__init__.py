"""Rehearsal of a long run: it is killed again and again, and must end with the bits of an undisturbed run."""
