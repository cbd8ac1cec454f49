"""Measurements of speed against what the machine can do."""
