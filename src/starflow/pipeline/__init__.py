"""Whole models: a conditioner, a flow and an autoencoder together, their folder, and where it is found."""
