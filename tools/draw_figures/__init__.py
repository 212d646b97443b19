"""The diagrams of README and docs, drawn by Matplotlib."""
