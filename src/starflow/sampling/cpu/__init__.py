"""The compiled token loop for CPUs: step.cpp, which is built once on the machine it runs on, and its Python side."""
