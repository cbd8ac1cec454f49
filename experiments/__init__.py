"""Experiments rerun the papers' claims at an affordable size, one command each: `python -m experiments NAME`."""
