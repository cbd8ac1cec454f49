"""Benchmarks: the speed of sampling and training against what the machine can do."""
