"""One run: its state, its folder, its checkpoints, its results."""
