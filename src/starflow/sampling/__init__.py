"""Noise to data: free functions over a model's blocks. No I/O, no process groups, no global state."""
