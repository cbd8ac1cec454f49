"""Transformer parts. Know torch and nothing of flows."""
