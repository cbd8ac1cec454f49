"""The Transformer parts that the flow's blocks are built of, in plain PyTorch; nothing here knows of flows."""
