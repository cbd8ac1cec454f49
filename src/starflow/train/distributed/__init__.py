"""Several processes that train one model: which there are, how they share the weights, and how they start."""
