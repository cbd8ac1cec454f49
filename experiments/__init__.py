"""The paper's claims at a size that anyone can rerun: one command each, `python -m experiments NAME`."""
