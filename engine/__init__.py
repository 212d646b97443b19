"""Runs of any task: training, evaluation, inference, checkpoints, processes. Imports neither models nor detection."""
