"""Self-attention, patch-text interaction and stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from counting_zoo.errors import InputError


def _check_heads(dim: int, heads: int) -> int:
    if heads < 1 or dim % heads:
        raise InputError(f"{heads} attention heads over a width of {dim}; expected a number that divides the width")
    return heads


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection; ``(B, N, dim)`` -> ``(B, N, dim)``."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = _check_heads(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(mixed))


class TextBias(nn.Module):
    """Cross-attention to one text vector.

    The softmax over a single key is 1, so the query, key and their norm cannot matter: the same vector is added to
    every patch. The reference keeps them as parameters that never train; here they do not exist.
    """

    def __init__(self, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.wv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor) -> Tensor:
        """``(B, 1, dim)`` -> ``(B, 1, dim)`` to add to each patch."""
        return self.dropout(self.proj(self.wv(text)))


class TextAttention(nn.Module):
    """Cross-attention of patches ``(B, N, dim)`` to all text tokens ``(B, L, dim)``; all-zero tokens are padding."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = _check_heads(dim, heads)
        self.wq, self.wk, self.wv = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or L, head_dim)
            for layer, source in ((self.wq, x), (self.wk, text), (self.wv, text))
        )
        real = (text != 0).any(-1)[:, None, None]  # (B, 1, 1, L)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=real).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(mixed))


class MLP(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, ratio: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(nn.functional.gelu(self.fc1(x)))))


class DropPath(nn.Module):
    """Drops a residual branch of whole samples with probability ``p`` in training; survivors are scaled by 1/(1-p)."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


__all__ = ["MLP", "DropPath", "SelfAttention", "TextAttention", "TextBias"]
