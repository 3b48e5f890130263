"""The version, where nothing heavy is imported."""

from __future__ import annotations

__version__ = "0.1.0"
