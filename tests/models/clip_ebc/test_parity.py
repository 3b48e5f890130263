"""The same numbers as the reference of CLIP-EBC, from its weights filled by a formula (see tests/golden)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from asking import ask
from places import GOLDEN
from tiny_clip import fill, relative
from torch import Tensor
from torch.nn.functional import interpolate

from counting_zoo import load_official
from counting_zoo.models.clip_ebc.heads import EBCOutput
from counting_zoo.models.clip_ebc.module import BlockwiseCounter
from counting_zoo.types import Batch

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
NUMBERS = ("no person", "one person", "two people", "three people", "more than four people")
PROMPTS = [f"There {'is' if 'person' in n else 'are'} {n}." for n in NUMBERS]


def image(seed: int, n: int, height: int, width: int) -> Tensor:
    """A picture in [0, 1]-like units whose normalised form is what the reference was given."""
    draw = np.random.RandomState(seed)
    low = torch.from_numpy(draw.standard_normal((n, 3, height // 16, width // 16)).astype(np.float32))
    noise = torch.from_numpy(draw.standard_normal((n, 3, height, width)).astype(np.float32))
    x = interpolate(low, (height, width), mode="bicubic", align_corners=False) + 0.3 * noise
    return x * STD + MEAN


@pytest.fixture(scope="module", params=["vit_b_16_vpt32", "resnet50", "vgg19_ae", "csrnet"])
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], BlockwiseCounter]:
    with np.load(GOLDEN / f"clip_ebc_{request.param}.npz") as file:
        golden = dict(file)
    state = {key: fill(key, tuple(shape)) for key, shape in json.loads(str(golden["shapes"])).items()}
    config: dict[str, Any] = {
        "reduction": 8,
        "bins": golden["bins"].tolist(),
        "anchor_points": golden["anchors"].tolist(),
    }
    if "tokens" in golden:
        backbone = request.param.removesuffix("_vpt32")
        config |= {"backbone": f"clip_{backbone}", "prompt_type": "word", "input_size": 224}
        ids = dict(zip(PROMPTS, golden["tokens"].tolist(), strict=True))
        tokenizer = lambda prompts: torch.tensor([ids[p] for p in prompts])  # noqa: E731
        model = load_official("clip_ebc", {f"model.{k}": v for k, v in state.items()}, config, tokenizer=tokenizer)
    else:
        model = load_official("clip_ebc", {"state_dict": state}, config | {"backbone": request.param})
    assert isinstance(model, BlockwiseCounter)
    return request.param, golden, model


def test_logits_density_and_count(case: tuple[str, dict[str, Any], BlockwiseCounter]) -> None:
    _, golden, model = case
    with torch.inference_mode():
        found = model(image(10, 2, 224, 224), ask([["people"]] * 2))
    assert relative(found.logits[:, :, ::4, ::4], golden["logits"]) < 1e-5
    assert relative(found.density, golden["density"]) < 1e-5
    assert relative(found.counts[:, 0], golden["count"]) < 1e-5
    if "text_features" in golden:
        assert relative(model.network.head.logits.text_features, golden["text_features"]) < 1e-5


@pytest.mark.parametrize("kind", ["mae", "mse", "dmcount"])
def test_losses_and_gradients(case: tuple[str, dict[str, Any], BlockwiseCounter], kind: str) -> None:
    _, golden, model = case
    model.count_loss = {"dmcount": "dm"}.get(kind, kind)  # type: ignore[assignment]
    with torch.no_grad():
        logits = model(image(10, 2, 224, 224), ask([["people"]] * 2)).logits
    logits.requires_grad_()
    output = EBCOutput(density=model.network.head.representatives(logits), logits=logits)
    batch: Batch = {
        "image": torch.zeros(2, 3, 224, 224),
        "queries": ask([["people"]] * 2),
        "image_id": ["a", "b"],
        "points": [torch.from_numpy(golden["points"]), torch.zeros(0, 2)],
    }
    terms = model.losses(output, batch)
    loss = torch.stack(list(terms.values())).sum()
    assert float(loss.detach()) == pytest.approx(float(golden[f"loss_{kind}"]), rel=1e-4)
    assert float(terms["classification"].detach()) == pytest.approx(float(golden[f"info_{kind}_ce_loss"]), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert relative(gradient[0, :, ::4, ::4], golden[f"grad_{kind}"]) < 1e-4


def test_sliding_windows(case: tuple[str, dict[str, Any], BlockwiseCounter]) -> None:
    _, golden, model = case
    height, width, window, stride = golden["slide_args"].tolist()
    with torch.inference_mode():
        (found,) = model.count_images(
            list(image(12, 1, height, width)), ask([["people"]]), window=window, stride=stride
        )
    assert relative(found.density, golden["slide_density"]) < 1e-5
    assert relative(found.counts[0, 0], golden["slide_count"]) < 1e-5
