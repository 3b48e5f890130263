"""Mean and deviation of colours that encoders were trained with."""

from __future__ import annotations

from typing import Literal

Normalization = Literal["clip", "imagenet"]

#: Mean and deviation of red, green and blue in [0, 1].
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

__all__ = ["STATISTICS", "Normalization"]
