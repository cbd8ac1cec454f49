"""The compiled token loop: one C++ source file, built once on the machine it runs on, and its Python side."""

from __future__ import annotations
