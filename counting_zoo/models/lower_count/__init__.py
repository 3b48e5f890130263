"""Lower-Count: counts and instance masks from image-level counts up to four."""

from __future__ import annotations

from counting_zoo.models.lower_count.module import LowerCount

__all__ = ["LowerCount"]
