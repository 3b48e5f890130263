"""The text tower: CLIP's transformer with learnable context tokens, read at the place that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from counting_zoo.errors import InputError
from counting_zoo.nn.tokenizer import Tokenizer, TokenizerLike

if TYPE_CHECKING:
    from transformers import CLIPModel

    from counting_zoo.nn.clip_resnet import CLIPResNetModel

TextPool = Literal["eot", "words", "official"]


class TextTower(nn.Module):
    """Embeds prompts; each distinct prompt once, cut at its end, and remembered in evaluation.

    Args:
        clip: gives the text model and the projection.
        n_context: learnable vectors put behind the begin-of-text token (CoOp; 0 for none).
        pool: where the feature is read. ``eot`` at the end-of-text token. ``official`` two places too early: the
            reference takes the position before its context tokens are inserted (models/clip_count.py:372), so the
            last word is never seen and every one-token prompt gives the same feature. ``words`` is the mean over
            the words, which a tower trained from scratch learns several times faster than ``eot``.
        train: whether the transformer itself trains.

    Shape:
        A list of n prompts gives ``(n, D)`` features, not normalised.
    """

    def __init__(self, clip: CLIPModel | CLIPResNetModel, *, n_context: int, pool: TextPool, train: bool) -> None:
        super().__init__()
        if pool not in ("eot", "words", "official"):
            raise InputError(f"text_pool is {pool!r}; expected 'eot', 'words' or 'official'")
        if n_context and pool == "words" and not len(clip.text_model.encoder.layers):
            raise InputError(
                f"n_context is {n_context}, but text_pool='words' over a text tower without layers never sees the "
                "context; set n_context to 0, or give text_config.num_hidden_layers"
            )
        self.model = clip.text_model
        self.projection = clip.text_projection
        self.pool = pool
        self.context_length = self.model.embeddings.position_embedding.num_embeddings
        width = self.model.embeddings.token_embedding.embedding_dim
        self.context = nn.Parameter(torch.empty(n_context, width).normal_(std=0.02)) if n_context else None
        for p in (*self.model.parameters(), *self.projection.parameters()):
            p.requires_grad_(train)
        self.tokenizer: Tokenizer | None = None
        self._cache: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}  # by prompt and whether autocast is on

    @property
    def n_context(self) -> int:
        """How many learnable context vectors there are."""
        return 0 if self.context is None else len(self.context)

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.projection.out_features

    def set_tokenizer(self, source: TokenizerLike) -> None:
        """Use a tokenizer; see :class:`~counting_zoo.nn.tokenizer.Tokenizer` for what it may be."""
        # The reference drops the last n_context of 77 tokens instead, the end of text of a long prompt among them.
        room = 0 if self.pool == "official" else self.n_context
        self.tokenizer = Tokenizer(source, self.context_length - room)
        self._cache.clear()

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """``(n, D)`` features of n prompts."""
        return self.encode(prompts)[0]

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Pooled ``(n, D)`` features, and ``(n, L, D)`` token features with zeros behind each end of text.

        Raises:
            InputError: there is no tokenizer yet, or a prompt is empty.
        """
        distinct = list(dict.fromkeys(prompts))
        keep = not (self.training or torch.is_grad_enabled())
        if not keep:
            self._cache.clear()  # this may be a step of training, which may run in evaluation mode
        place = {p: i for i, p in enumerate(distinct)}
        index = torch.tensor([place[p] for p in prompts], device=self.projection.weight.device)
        if not keep:
            pooled, tokens, ends = self._run(distinct)
            return pooled[index], tokens[:, : int(ends.max()) + 1][index]
        lowered = torch.is_autocast_enabled(self.projection.weight.device.type)
        found = {p: self._cache[p, lowered] for p in distinct if (p, lowered) in self._cache}
        # One prompt at a time: then its bits do not depend on what else was asked, now or before.
        for prompt in [p for p in distinct if p not in found]:
            pooled, tokens, ends = self._run([prompt])
            found[prompt] = self._cache[prompt, lowered] = (pooled[0], tokens[0, : int(ends[0]) + 1])
        rows = [found[p] for p in distinct]
        padded = nn.utils.rnn.pad_sequence([tokens for _, tokens in rows], batch_first=True)
        return torch.stack([pooled for pooled, _ in rows])[index], padded[index]

    def _run(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer yet: give it one (tokenizer=...: a folder or hub name), or fit it on data "
                "with class names, from which a random-weight CLIP makes its own"
            )
        ids, ends = self.tokenizer(prompts)
        weight = self.model.embeddings.token_embedding.weight
        if int(ids.max()) >= len(weight):
            raise InputError(
                f"the tokenizer gives id {int(ids.max())}, but the text tower knows {len(weight)} tokens; "
                "tokenizer and CLIP weights do not belong together"
            )
        ids, n = ids.to(weight.device), self.n_context
        hidden = self.model.embeddings.token_embedding(ids)  # (n, L, width)
        if self.context is not None:
            context = self.context.to(hidden.dtype).expand(len(ids), -1, -1)
            hidden = torch.cat([hidden[:, :1], context, hidden[:, 1:]], 1)[:, : self.context_length]
        length = hidden.shape[1]
        hidden = hidden + self.model.embeddings.position_embedding.weight[:length]
        mask = torch.full((length, length), float("-inf"), device=hidden.device, dtype=hidden.dtype).triu(1)
        for layer in self.model.encoder.layers:
            hidden = layer(hidden, mask[None, None])
        projected = self.projection(self.model.final_layer_norm(hidden))  # (n, L, D)
        ends = ends.to(weight.device)
        place = torch.arange(length, device=weight.device)
        tokens = projected * (place <= (ends + n)[:, None])[..., None]
        if self.pool == "words":
            words = ((place > n) & (place < (ends + n)[:, None])).to(projected.dtype)[..., None]
            pooled = (projected * words).sum(1) / words.sum(1).clamp(min=1)
        else:
            read = ends if self.pool == "official" else ends + n
            pooled = projected[torch.arange(len(ids), device=ids.device), read]
        return pooled, tokens, (ends + n).clamp(max=length - 1)

    def train(self, mode: bool = True) -> TextTower:
        if mode != self.training:
            self._cache.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> TextTower:
        self._cache.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache.clear()
        super()._load_from_state_dict(*args, **kwargs)


__all__ = ["TextPool", "TextTower"]
