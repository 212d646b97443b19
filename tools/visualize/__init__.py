"""Draw attention, influence between windows, attention rollout and Grad-CAM: `python -m tools.visualize`."""
