"""Training of any task: runs, the training loop, checkpoints, processes. Knows neither images nor boxes."""
