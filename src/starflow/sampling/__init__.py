"""Sampling: noise to data by free functions over a model's blocks, without I/O, process groups or global state."""
