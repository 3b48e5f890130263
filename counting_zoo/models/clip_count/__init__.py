"""CLIP-Count: text-guided zero-shot counting (arXiv 2305.07304)."""

from counting_zoo.models.clip_count.module import CLIPCount
from counting_zoo.models.clip_count.network import CLIPCountNet, CLIPCountOutput

__all__ = ["CLIPCount", "CLIPCountNet", "CLIPCountOutput"]
