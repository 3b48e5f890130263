"""OpenAI's nine CLIP models under the names that counting code has for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedCLIP:
    """Sizes of a published CLIP, and where its weights are.

    Args:
        hub: repository on the hub.
        layers: of the image tower: four numbers of blocks of a ResNet, or those of a vision transformer.
        width: of the image tower.
        projection_dim: of the joint space.
        text_width: of the text tower, which has twelve layers, 77 positions and 49408 tokens throughout.
        image_size: side of the pictures it was trained on.
        patch: of a vision transformer.
    """

    hub: str
    layers: tuple[int, int, int, int] | int
    width: int
    projection_dim: int
    text_width: int
    image_size: int
    patch: int | None = None

    def config(self) -> dict[str, Any]:
        """What ``build_towers`` takes for a model of these sizes with random weights."""
        text = _tower(self.text_width, 12) | {
            "vocab_size": 49408, "max_position_embeddings": 77,
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
        }  # fmt: skip
        if isinstance(self.layers, int):
            vision = _tower(self.width, self.layers) | {"patch_size": self.patch, "image_size": self.image_size}
        else:
            vision = {"layers": list(self.layers), "width": self.width, "image_size": self.image_size}
        return {"projection_dim": self.projection_dim, "vision_config": vision, "text_config": text}


def _tower(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "hidden_act": "quick_gelu",
    }  # fmt: skip


PUBLISHED = {
    "resnet50": PublishedCLIP("timm/resnet50_clip.openai", (3, 4, 6, 3), 64, 1024, 512, 224),
    "resnet101": PublishedCLIP("timm/resnet101_clip.openai", (3, 4, 23, 3), 64, 512, 512, 224),
    "resnet50x4": PublishedCLIP("timm/resnet50x4_clip.openai", (4, 6, 10, 6), 80, 640, 640, 288),
    "resnet50x16": PublishedCLIP("timm/resnet50x16_clip.openai", (6, 8, 18, 8), 96, 768, 768, 384),
    "resnet50x64": PublishedCLIP("timm/resnet50x64_clip.openai", (3, 15, 36, 10), 128, 1024, 1024, 448),
    "vit_b_32": PublishedCLIP("openai/clip-vit-base-patch32", 12, 768, 512, 512, 224, 32),
    "vit_b_16": PublishedCLIP("openai/clip-vit-base-patch16", 12, 768, 512, 512, 224, 16),
    "vit_l_14": PublishedCLIP("openai/clip-vit-large-patch14", 24, 1024, 768, 768, 224, 14),
    "vit_l_14_336px": PublishedCLIP("openai/clip-vit-large-patch14-336", 24, 1024, 768, 768, 336, 14),
}


__all__ = ["PUBLISHED", "PublishedCLIP"]
