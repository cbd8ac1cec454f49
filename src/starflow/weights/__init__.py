"""Weights of others: the published layouts."""
