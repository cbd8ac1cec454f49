"""What a pipeline is made of: its configuration, the folders of its parts, the sizes that it makes, its card."""

from __future__ import annotations
