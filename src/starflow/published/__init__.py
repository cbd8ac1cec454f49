"""Other people's weights: published checkpoints and their options, their conversion, and Gemma's layers."""
