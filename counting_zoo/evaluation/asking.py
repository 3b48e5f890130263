"""Asking a model many prompts about one picture, which is encoded once for all of them."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counting_zoo.counter import Counter
from counting_zoo.errors import InputError
from counting_zoo.geometry import Preprocess
from counting_zoo.types import CountOutput

INDEPENDENT_WITHIN = 1e-3
"""Counts of a prompt asked alone and among others that differ by more than this part of the larger one, or of 1, come
from a model in which names compete."""

_PLAIN = (type(None), str, int, float, list, tuple, dict, Preprocess)


@dataclass(frozen=True)
class Cost:
    """What one pass for all prompts saves.

    Args:
        pictures, prompts: how many of each were asked both ways.
        one_by_one, together: seconds.
        difference: largest difference of a count between the two, relative to the count or to 1.
    """

    pictures: int
    prompts: int
    one_by_one: float
    together: float
    difference: float

    @property
    def ratio(self) -> float:
        """How many times longer one pass for each prompt takes."""
        return self.one_by_one / self.together if self.together > 0 else math.nan


def check_listens(model: Counter) -> None:
    """Refuse a model that cannot be asked about any name.

    Raises:
        InputError: it does not read prompts, or knows a fixed list of names only.
    """
    kind = type(model).__name__
    if not getattr(model, "text_guided", False):
        raise InputError(
            f"{kind} does not read a prompt when it counts, so an audit of prompts says nothing about it; expected a "
            "text-guided model such as CLIPCount or RegionCLIPCounter"
        )
    if model.vocabulary is not None:
        raise InputError(
            f"{kind} counts {len(model.vocabulary)} fixed names and takes no other prompt; expected a text-guided "
            "model such as CLIPCount or RegionCLIPCounter"
        )


class Asker:
    """Asks prompts about pictures.

    Args:
        model: in evaluation mode. Its texts are encoded once and remembered by itself.
        prompts_at_once: most prompts in one pass.
    """

    def __init__(self, model: Counter, prompts_at_once: int = 64) -> None:
        self.model = model
        self.prompts_at_once = prompts_at_once
        #: Whether the prompts of a picture may go through together; see :meth:`compare`.
        self.together = True

    def output(self, seen: Tensor, prompts: list[str], image_id: str, stored: tuple[int, int]) -> CountOutput:
        """One pass: what the model says of ``(3, H, W)`` as it sees it, for all prompts."""
        outputs = self.model.count_batch([seen], [prompts], image_ids=[image_id], sizes=[stored])
        assert isinstance(outputs, list)  # as for every list of pictures
        return outputs[0]

    def counts(self, seen: Tensor, prompts: Sequence[str], image_id: str, stored: tuple[int, int]) -> dict[str, float]:
        """The count of each prompt.

        Raises:
            FloatingPointError: one is not finite.
        """
        step = self.prompts_at_once if self.together else 1
        found: dict[str, float] = {}
        for first in range(0, len(prompts), step):
            asked = list(prompts[first : first + step])
            counts = self.model.reported(self.output(seen, asked, image_id, stored).counts)[0].tolist()
            found.update(zip(asked, counts, strict=True))
        if not all(math.isfinite(count) for count in found.values()):
            raise FloatingPointError(f"counts are {found}")
        return found

    def compare(self, pictures: Sequence[tuple[Tensor, str, tuple[int, int]]], prompts: Sequence[str]) -> Cost:
        """Ask pictures all prompts in one pass and in one pass for each, and go on with what gives the counts alone.

        Args:
            pictures: as the model sees them, with their ids and stored sizes.
            prompts: which are asked.
        """
        alone, together, difference = 0.0, 0.0, 0.0
        self.together = True
        for seen, image_id, stored in pictures:
            self.counts(seen, prompts, image_id, stored)  # texts are encoded, and the device is warm
            start = self._now()
            at_once = self.counts(seen, prompts, image_id, stored)
            middle = self._now()
            one_by_one = {p: self.counts(seen, [p], image_id, stored)[p] for p in prompts}
            alone, together = alone + self._now() - middle, together + middle - start
            for prompt, count in one_by_one.items():
                difference = max(difference, abs(at_once[prompt] - count) / max(1.0, abs(count)))
        self.together = difference <= INDEPENDENT_WITHIN
        return Cost(len(pictures), len(prompts), alone, together, difference)

    def _now(self) -> float:
        if torch.device(self.model.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def model_sha256(model: Counter) -> str:
    """A hash of a model's weights and settings, by which finished work is known again.

    Settings are taken as they are now: whoever gives ``model.window`` another value counts with another model. What
    else a checkpoint would keep, such as the tokenizer, is part of it.
    """
    own = vars(model)
    settings = {
        name: str(own[name] if name in own and isinstance(own[name], _PLAIN) else value)
        for name, value in sorted(getattr(model, "hparams", {}).items())
    }
    kind = type(model)
    recipe: Any = getattr(model, "recipe", dict)
    named = json.dumps([f"{kind.__module__}.{kind.__qualname__}", settings, recipe()], sort_keys=True, default=str)
    digest = hashlib.sha256(named.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


__all__ = ["INDEPENDENT_WITHIN", "Asker", "Cost", "check_listens", "model_sha256"]
