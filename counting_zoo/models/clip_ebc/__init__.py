"""CLIP-EBC and its relatives: counting by classifying blocks."""

from __future__ import annotations

from counting_zoo.models.clip_ebc.module import CLIPEBC, EBC

__all__ = ["CLIPEBC", "EBC"]
