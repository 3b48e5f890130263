"""The text tower of CLIP and its tokenizers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.clip import hub_answers

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

    from counting_zoo.nn.clip_resnet import CLIPResNetModel

TokenizerLike = Any  # a HuggingFace tokenizer, a folder or hub name, or a callable list[str] -> (B, L) int64


class Tokenizer:
    """Ids and end positions of prompts, whatever makes the ids.

    Args:
        source: a HuggingFace tokenizer, a folder, a hub name, the JSON that :meth:`to_json` gives, or any callable
            ``list[str] -> (B, L) int64`` that puts the end-of-text id, the largest of all ids, behind the words.
        max_tokens: ids a prompt may take, begin and end of text included.
    """

    def __init__(self, source: TokenizerLike, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.known: dict[str, list[int]] = {}  # prompts a callable has been asked for, so a checkpoint can keep them
        self._hf: PreTrainedTokenizerBase | None = None
        self._call: Callable[[list[str]], Tensor] | None = None
        if isinstance(source, str | Path):
            source = _load(str(source))
        if isinstance(source, dict):
            self.known = source
        elif hasattr(source, "encode") and hasattr(source, "eos_token_id"):
            self._hf = source
        elif callable(source):
            self._call = source
        else:
            raise InputError(
                f"tokenizer is a {type(source).__name__}; expected a HuggingFace tokenizer, a folder, a hub name or a "
                "callable list[str] -> (B, L) ids"
            )

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``(n, L)`` int64 ids padded on the right, and ``(n,)`` positions of the end-of-text token.

        Raises:
            InputError: a prompt is empty, or unknown to a checkpoint that was saved without its tokenizer.

        Warns:
            UserWarning: a prompt is too long; says which words are cut.
        """
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise InputError(f"an empty prompt ({prompt!r}) among {list(prompts)[:5]}; name what is to be counted")
        rows = [self._hf_ids(prompt) for prompt in prompts] if self._hf is not None else self._called_ids(prompts)
        ends = torch.tensor([len(row) - 1 for row in rows])
        ids = torch.zeros(len(rows), int(ends.max()) + 1, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, ends

    def _hf_ids(self, prompt: str) -> list[int]:
        assert self._hf is not None
        row = self._hf.encode(prompt)
        if row[-1] != self._hf.eos_token_id:
            raise InputError(
                f"the tokenizer ends {prompt!r} with id {row[-1]} instead of its end-of-text id "
                f"{self._hf.eos_token_id}; expected a CLIP tokenizer, which adds begin and end of text"
            )
        kept = row[: self.max_tokens - 1]
        return self._cut(prompt, row, f"kept {str(self._hf.decode(kept[1:])).strip()!r} of ")

    def _cut(self, prompt: str, row: list[int], kept: str = "") -> list[int]:
        """Cut a row of ids to what fits, its end-of-text id kept."""
        if len(row) <= self.max_tokens:
            return row
        warnings.warn(f"prompt of {len(row)} tokens cut to {self.max_tokens}: {kept}{prompt!r}", stacklevel=5)
        return [*row[: self.max_tokens - 1], row[-1]]

    def _called_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if new and self._call is None:
            raise InputError(
                f"the prompt {new[0]!r} is unknown: this checkpoint was saved with a tokenizer that is a plain "
                f"function, so it knows only the prompts it was asked before ({list(self.known)[:5]}); give "
                "load(..., tokenizer=...) a HuggingFace tokenizer, folder or hub name"
            )
        if new:
            assert self._call is not None
            for prompt, row in zip(new, torch.as_tensor(self._call(new)).tolist(), strict=True):
                end = row.index(max(row))
                self.known[prompt] = self._cut(prompt, [int(i) for i in row[: end + 1]])
        return [self.known[p] for p in prompts]

    def to_json(self) -> str:
        """Serialise everything a checkpoint needs to make the same ids again."""
        if self._hf is None:
            return json.dumps({"known": self.known})
        backend = json.loads(self._hf.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        special = {k: v for k, v in self._hf.special_tokens_map.items() if isinstance(v, str)}
        return json.dumps({"tokenizer": backend, "special": special})


def _load(source: str) -> Any:
    """Load a tokenizer from JSON, a folder or a hub name."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.lstrip().startswith("{"):
        stored = json.loads(source)
        if "known" in stored:
            return stored["known"]
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(json.dumps(stored["tokenizer"]))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **stored["special"])
    local = Path(source).expanduser().is_dir()
    name = str(Path(source).expanduser()) if local else source
    try:
        try:
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            if local or not hub_answers():
                raise
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"no tokenizer in {source!r}: expected a folder with tokenizer.json, or a hub name that is cached or "
            "reachable; tokenizer=... takes a folder, a hub name, a HuggingFace tokenizer or a callable"
        ) from error


def word_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Build a byte-level BPE tokenizer in which each word of ``texts`` is one token and any other text still encodes.

    Args:
        texts: names or sentences of the data it is for.
        vocab_size: at most this many tokens; at least 258 (every byte, begin and end of text).

    Raises:
        InputError: ``vocab_size`` is too small for every byte.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise InputError(f"text_config.vocab_size is {vocab_size}; expected at least 258 to spell any text")
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[bos, eos],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sorted(set(texts)), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, backend.token_to_id(bos)), (eos, backend.token_to_id(eos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)


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
        self.tokenizer_is_made = False
        self._cache: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}  # by prompt and whether autocast is on

    @property
    def n_context(self) -> int:
        """Number of learnable context vectors."""
        return 0 if self.context is None else len(self.context)

    @property
    def dim(self) -> int:
        """Width D of the features."""
        return self.projection.out_features

    def set_tokenizer(self, source: TokenizerLike) -> None:
        """Use a tokenizer; see :class:`~counting_zoo.nn.text.Tokenizer` for what it may be."""
        # The reference drops the last n_context of 77 tokens instead, the end of text of a long prompt among them.
        room = 0 if self.pool == "official" else self.n_context
        self.tokenizer = Tokenizer(source, self.context_length - room)
        self.tokenizer_is_made = False
        self._cache.clear()

    def tokenizer_of(self, texts: Sequence[str]) -> TokenizerLike:
        """Make a tokenizer of the words of some texts that fits the tower's vocabulary."""
        return word_tokenizer(texts, self.model.embeddings.token_embedding.num_embeddings)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Encode n prompts to ``(n, D)`` features."""
        return self.encode(prompts)[0]

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode to pooled ``(n, D)`` features, and ``(n, L, D)`` token features with zeros behind each end of text.

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
