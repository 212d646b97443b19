"""What a network attends to, which windows inform which, and where it sees a class: `python -m tools.visualize`."""
