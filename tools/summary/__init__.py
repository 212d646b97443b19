"""Parameters and multiply-adds of networks, of an MSG-Transformer stage by stage: `python -m tools.summary`."""
