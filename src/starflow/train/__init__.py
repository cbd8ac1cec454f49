"""Training: objective, optimiser, averaged weights, checkpoints, the loop, and the stages of a recipe."""
