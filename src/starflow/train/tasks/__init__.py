"""What can be trained: each task brings its data, its loss and its held-out measures to `starflow.train.loop.fit`."""
