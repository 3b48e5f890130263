"""Turning names into token ids: HuggingFace tokenizers, any callable, or a small one made from a word list."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.clip import hub_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        """A row of ids that fits, its end-of-text id kept."""
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
        """Everything a checkpoint needs to make the same ids again."""
        if self._hf is None:
            return json.dumps({"known": self.known})
        backend = json.loads(self._hf.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        special = {k: v for k, v in self._hf.special_tokens_map.items() if isinstance(v, str)}
        return json.dumps({"tokenizer": backend, "special": special})


def _load(source: str) -> Any:
    """A tokenizer from JSON, a folder or a hub name."""
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
    """A byte-level BPE tokenizer in which each word of ``texts`` is one token and any other text still encodes.

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


__all__ = ["Tokenizer", "TokenizerLike", "word_tokenizer"]
