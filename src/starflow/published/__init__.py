"""Weights of others: the published layouts."""

from __future__ import annotations
