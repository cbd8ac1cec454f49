"""Training: the recipe of a run and its stages, the loop with its data, optimiser, checkpoints and log."""
