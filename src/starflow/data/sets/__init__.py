"""Data sets that are prepared or read by name: the emoji glyphs, Fashion-MNIST and MNIST's digits, drawn shapes."""
