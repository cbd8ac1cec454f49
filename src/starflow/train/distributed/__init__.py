"""Several processes that train one model: who is there, how weights are split, and how they begin."""
