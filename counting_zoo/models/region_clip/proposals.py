"""Class-agnostic boxes: from detectors of the transformers library, and every other source under one roof.

This is the only file beside ``nn/`` that imports transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.models.region_clip.box_files import FileProposals
from counting_zoo.models.region_clip.box_sources import (
    GridProposals,
    ProposalSource,
    Proposed,
    Size,
    check_pictures,
    kept_inside,
    random_boxes,
)
from counting_zoo.models.region_clip.tiles import tiled
from counting_zoo.nn.clip import hub_answers


class _Detector:
    """A frozen detector with its own preprocessing; what is found in a picture does not depend on others with it."""

    def __init__(self, loaded: tuple[Any, Any], threshold: float, saturation: float, together: int) -> None:
        self.model, self.processor = loaded
        if not 0 <= threshold <= 1 or not 0 < saturation <= 1 or together < 1:
            raise InputError(
                f"{type(self).__name__}: threshold is {threshold}, saturation {saturation}, together {together}; "
                "expected 0 to 1, above 0 to 1, and at least 1"
            )
        self.threshold, self.saturation, self.together = threshold, saturation, together
        self.model.float().eval().requires_grad_(False)  # it may be stored in half precision

    def __call__(
        self, images: Sequence[Tensor], image_ids: Sequence[str], sizes: Sequence[Size] | None = None
    ) -> list[Proposed]:
        check_pictures(images, image_ids, sizes)
        return [found for batch in self._batches(images, image_ids) for found in self._run(*batch)]

    def _batches(
        self, images: Sequence[Tensor], image_ids: Sequence[str]
    ) -> Iterator[tuple[dict[str, Tensor], list[Size], torch.device]]:
        """Neighbouring pictures that come out of the preprocessing alike: none is padded for another's sake."""
        inputs = (
            (self._preprocessed(image, name), (int(image.shape[-2]), int(image.shape[-1])), image.device)
            for image, name in zip(images, image_ids, strict=True)
        )
        for (_, device), group in groupby(inputs, key=lambda one: (one[0]["pixel_values"].shape, one[2])):
            batch: list[tuple[dict[str, Tensor], Size]] = []
            for one, size, _ in group:
                batch.append((one, size))
                if len(batch) == self.together:
                    yield _stacked(batch, device)
                    batch = []
            if batch:
                yield _stacked(batch, device)

    def _preprocessed(self, image: Tensor, name: str) -> dict[str, Tensor]:
        pixels = image.detach()
        if pixels.dtype != torch.uint8:
            low, high = pixels.aminmax()
            # Resizing may have overshot a little; normalised pixels, or those up to 255, are another thing.
            if not (low > -0.5 and high < 1.5):
                raise InputError(
                    f"{name}: pixels are {float(low):g} to {float(high):g}; expected 0 to 1, or uint8, not normalised"
                )
            pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
        found = self.processor(images=[pixels.cpu().numpy()], input_data_format="channels_first", return_tensors="pt")
        return {key: found[key] for key in ("pixel_values", "pixel_mask") if key in found}

    @torch.no_grad()
    def _run(self, inputs: dict[str, Tensor], sizes: list[Size], device: torch.device) -> list[Proposed]:
        self.model.to(device)
        with torch.autocast(device.type, enabled=False):
            boxes, scores = self._detect({key: value.to(device) for key, value in inputs.items()})
        return [self._of(*each) for each in zip(boxes.float(), scores.float(), sizes, strict=True)]

    def _detect(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``(B, Q, 4)`` centre x, centre y, width, height, and ``(B, Q)`` objectness in [0, 1]."""
        raise NotImplementedError

    def _of(self, boxes: Tensor, scores: Tensor, size: Size) -> Proposed:
        raise NotImplementedError

    def _saturated(self, scores: Tensor) -> bool:
        passed = int((scores > self.threshold).sum())
        return passed > 0 and passed >= self.saturation * len(scores)

    def _scaled(self, boxes: Tensor, scores: Tensor, scale: Size, size: Size, saturated: bool) -> Proposed:
        """What passes the threshold; ``scale`` is the height and width that 1 stands for."""
        passed = scores > self.threshold
        centre, extent = boxes[passed].double().split(2, 1)
        corners = torch.cat([centre - extent / 2, centre + extent / 2], 1)
        return kept_inside(corners * corners.new_tensor(scale[::-1] * 2), scores[passed], size, saturated)


def _stacked(
    batch: list[tuple[dict[str, Tensor], Size]], device: torch.device
) -> tuple[dict[str, Tensor], list[Size], torch.device]:
    inputs = {key: torch.cat([one[key] for one, _ in batch]) for key in batch[0][0]}
    return inputs, [size for _, size in batch], device


class Owlv2Proposals(_Detector):
    """OWLv2's boxes and objectness (Minderer et al., NeurIPS 2023), which need no text: one box for each patch.

    The model sees a square, the picture with black on its right or below; boxes whose centre lies in the black are none
    of the picture. Saturated means that at least the part ``saturation`` of the picture's own patches passes the
    threshold: with one box each, there may be objects that share a patch.

    Args:
        source: folder written by ``save_pretrained``, or hub name (``google/owlv2-base-patch16-ensemble``).
        threshold: of the objectness.
        saturation: see above.
        together: pictures that go through the model at once.

    Raises:
        InputError: a number out of range, or pictures of a call that are none.
        WeightsError: nothing is found there, the hub cannot be reached, or weights are missing.
    """

    def __init__(
        self, source: str | Path, threshold: float = 0.1, *, saturation: float = 0.5, together: int = 4
    ) -> None:
        def load(place: str, local_only: bool) -> tuple[Any, dict[str, Any]]:
            from transformers import AutoConfig, Owlv2ForObjectDetection

            config = AutoConfig.from_pretrained(place, local_files_only=local_only, trust_remote_code=False)
            if config.model_type != "owlv2":
                raise WeightsError(f"{place!r} holds a model of the type {config.model_type!r}; expected 'owlv2'")
            found: Any = Owlv2ForObjectDetection.from_pretrained(
                place, config=config, local_files_only=local_only, output_loading_info=True
            )
            return found

        super().__init__(_load(str(source), load), threshold, saturation, together)

    def _detect(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        features = self.model.image_embedder(inputs["pixel_values"])[0]  # (B, h, w, D)
        patches = features.flatten(1, 2)
        return self.model.box_predictor(patches, features), self.model.objectness_predictor(patches).sigmoid()

    def _of(self, boxes: Tensor, scores: Tensor, size: Size) -> Proposed:
        side, grid = max(size), round(len(scores) ** 0.5)
        place = (torch.arange(grid, device=boxes.device) + 0.5) * side / grid
        own = ((place < size[0])[:, None] & (place < size[1])).flatten()  # (h * w,) patches whose centre is inside
        inside = (boxes[:, :2] * side < boxes.new_tensor(size[::-1])).all(1)
        saturated = self._saturated(scores[own])
        return self._scaled(boxes[inside], scores[inside], (side, side), size, saturated)


class DetrProposals(_Detector):
    """Boxes of any detector of the DETR family in transformers, with the probability of its likeliest class.

    Whether classes compete (a softmax, with one more for "no object") or not (sigmoids) follows from the number of
    logits: one more than the model has labels, or as many. Saturated means that at least the part ``saturation`` of its
    queries passes the threshold: it has no more boxes to give.

    Args:
        source: folder written by ``save_pretrained``, with the model and its image processor, or hub name
            (``PekingU/rtdetr_v2_r18vd``).
        threshold: of the probability.
        saturation: see above.
        together: pictures that go through the model at once.

    Raises:
        InputError: a number out of range, or pictures of a call that are none.
        WeightsError: nothing is found there, the hub cannot be reached, weights are missing, or the model needs timm or
            torchvision.
    """

    def __init__(
        self, source: str | Path, threshold: float = 0.1, *, saturation: float = 0.9, together: int = 4
    ) -> None:
        def load(place: str, local_only: bool) -> tuple[Any, dict[str, Any]]:
            from transformers import AutoModelForObjectDetection

            found: Any = AutoModelForObjectDetection.from_pretrained(
                place, local_files_only=local_only, trust_remote_code=False, output_loading_info=True
            )
            return found

        super().__init__(_load(str(source), load), threshold, saturation, together)
        self._takes_mask = "pixel_mask" in inspect.signature(self.model.forward).parameters

    def _detect(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if not self._takes_mask:
            inputs = {"pixel_values": inputs["pixel_values"]}
        output = self.model(**inputs)
        logits, labels = output.logits, self.model.config.num_labels
        if logits.shape[2] not in (labels, labels + 1):
            raise WeightsError(
                f"{type(self.model).__name__} has {logits.shape[2]} logits for {labels} labels; expected as many, or "
                "one more for 'no object'"
            )
        scores = logits.sigmoid() if logits.shape[2] == labels else logits.softmax(2)[..., :-1]
        return output.pred_boxes, scores.amax(2)

    def _of(self, boxes: Tensor, scores: Tensor, size: Size) -> Proposed:
        return self._scaled(boxes, scores, size, size, self._saturated(scores))


def _load(source: str, load: Callable[[str, bool], tuple[Any, dict[str, Any]]]) -> tuple[Any, Any]:
    """A detector and its image processor, out of a folder, the local cache or the hub."""
    from transformers.utils import logging

    folder = Path(source).expanduser().is_dir()
    place = str(Path(source).expanduser()) if folder else source
    if not folder and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise WeightsError(f"there is no folder {source!r}, and it is no hub name either (expected 'owner/name')")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        try:
            model, info = load(place, True)
            processor = _processor(place, True)
        except OSError:
            if folder or not hub_answers():
                raise
            model, info = load(place, False)
            processor = _processor(place, False)
    except ImportError as error:
        raise WeightsError(
            f"the detector {source!r} needs a library that is not installed; take a model without timm or torchvision "
            f"(for DETR, a checkpoint whose config has use_timm_backbone false), and install Pillow if that is what is "
            f"missing ({str(error).strip().splitlines()[0]})"
        ) from error
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"no detector {source!r}: it is neither a folder with model and image processor nor in the local cache, or "
            f"the hub cannot be reached; download it once where there is a network (huggingface-cli download {source}) "
            f"or give a folder ({str(error).strip().splitlines()[0]})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # transformers fills what is missing with random values and only warns.
    if bad := sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", [])])):
        raise WeightsError(f"the detector {source!r} lacks {len(bad)} weights or has them in other shapes: {bad[:5]}")
    return model, processor


def _processor(place: str, local_only: bool) -> Any:
    from transformers import AutoImageProcessor

    # Pillow's, so that pictures are the same whether or not torchvision is there.
    return AutoImageProcessor.from_pretrained(
        place, local_files_only=local_only, trust_remote_code=False, backend="pil"
    )


def proposal_source(name: str, *, missing: Literal["error", "empty"] = "error") -> ProposalSource:
    """A source by a short text, as it stands in a configuration.

    Args:
        name: ``grid``, a ``.json`` or ``.csv`` file, or ``owlv2:`` or ``detr:`` and a folder or hub name.
        missing: what to do about a picture that a file does not name; see
            :class:`~counting_zoo.models.region_clip.box_files.FileProposals`.

    Raises:
        InputError: it is none of these, or the file cannot be read.
        WeightsError: as from :class:`Owlv2Proposals` and :class:`DetrProposals`.
    """
    kind, _, place = name.partition(":")
    if name == "grid":
        return GridProposals()
    if kind in ("owlv2", "detr") and place:
        return Owlv2Proposals(place) if kind == "owlv2" else DetrProposals(place)
    if Path(name).suffix.lower() in (".json", ".csv"):
        return FileProposals(name, missing)
    raise InputError(
        f"proposals are {name!r}; expected 'grid', a .json or .csv file, or 'owlv2:' or 'detr:' with a folder or "
        "hub name"
    )


__all__ = [
    "DetrProposals", "FileProposals", "GridProposals", "Owlv2Proposals", "ProposalSource", "Proposed",
    "proposal_source", "random_boxes", "tiled",
]  # fmt: skip
