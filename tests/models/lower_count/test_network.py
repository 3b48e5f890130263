"""Lower-Count's encoders and branches: against second implementations, at any size, and out of Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_clip import fill
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, max_pool2d, relu

from counting_zoo import LowerCount, load, save
from counting_zoo.errors import InputError, WeightsError
from counting_zoo.models.lower_count import network as encoders
from counting_zoo.models.lower_count.network import (
    RESNETS,
    LowerCountConfig,
    LowerCountNet,
    LowerCountOutput,
    ModulatedDensity,
    build_encoder,
)
from counting_zoo.nn.backbones import SmallEncoder

NORM = ("running_mean", "running_var", "weight", "bias")
#: Backbones of the transformers library, at tiny sizes.
TINY: dict[str, dict[str, Any]] = {
    "resnet": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    },
}


class Cells(nn.Module):
    """An encoder that says which pixels it has seen: the mean of each cell."""

    def __init__(self, stride: int, multiple: int) -> None:
        super().__init__()
        self.dim, self.stride, self.multiple = 3, stride, multiple

    def forward(self, x: Tensor) -> Tensor:
        assert not x.shape[-1] % self.multiple
        assert not x.shape[-2] % self.multiple
        return nn.functional.avg_pool2d(x, self.stride)


def randomised(module: Any, seed: int = 0) -> Any:
    """With batch statistics that show, in evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.bias.data, m.running_mean):
                t.copy_(torch.randn(t.shape, generator=g) * 0.5 + 0.3)  # type: ignore[union-attr]
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)  # type: ignore[union-attr]
    return module.eval()


def small(n_classes: int = 3, seed: int = 0, **options: Any) -> LowerCountNet:
    torch.manual_seed(seed)
    return LowerCountNet(SmallEncoder(8, 4), n_classes, LowerCountConfig(**options))


# -- torchvision's ResNets --------------------------------------------------------------------------------------------


def resnet_shapes(depths: list[int], kind: str, widths: list[int], stem: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's state dict; ``widths`` are those of the last convolution of a stage."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(convolution: str, norm: str, inside: int, out: int, side: int) -> None:
        shapes[f"{convolution}.weight"] = (out, inside, side, side)
        shapes.update({f"{norm}.{leaf}": (out,) for leaf in NORM})
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv("conv1", "bn1", 3, stem, 7)
    inside = stem
    for stage, (depth, out) in enumerate(zip(depths, widths, strict=True)):
        for i in range(depth):
            block, narrow = f"layer{stage + 1}.{i}", out // 4
            sides = [(inside, out, 3), (out, out, 3)]
            if kind == "bottleneck":
                sides = [(inside, narrow, 1), (narrow, narrow, 3), (narrow, out, 1)]
            for k, (a, b, side) in enumerate(sides, 1):
                conv(f"{block}.conv{k}", f"{block}.bn{k}", a, b, side)
            if i == 0 and (stage > 0 or inside != out):
                conv(f"{block}.downsample.0", f"{block}.downsample.1", inside, out, 1)
            inside = out
    return shapes


def resnet_features(s: dict[str, Tensor], x: Tensor) -> Tensor:
    """conv1 to layer4 as torchvision computes them (v1.5: the 3 x 3 convolution of a bottleneck has the stride)."""

    def step(x: Tensor, convolution: str, norm: str, stride: int) -> Tensor:
        weight = s[f"{convolution}.weight"]
        x = conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, scale, shift = (s[f"{norm}.{leaf}"] for leaf in NORM)
        return batch_norm(x, mean, var, scale, shift)

    x = max_pool2d(relu(step(x, "conv1", "bn1", 2)), 3, 2, 1)
    blocks = sorted({tuple(int(n) for n in key[5:].split(".")[:2]) for key in s if key.startswith("layer")})
    for stage, i in blocks:
        block = f"layer{stage}.{i}"
        stride = 2 if stage > 1 and i == 0 else 1
        n = 3 if f"{block}.conv3.weight" in s else 2
        y = x
        for k in range(1, n + 1):
            strided = k == (2 if n == 3 else 1)
            y = step(y, f"{block}.conv{k}", f"{block}.bn{k}", stride if strided else 1)
            y = relu(y) if k < n else y
        if f"{block}.downsample.0.weight" in s:
            x = step(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
        x = relu(y + x)
    return x


def torchvision_file(path: Path, depths: list[int], kind: str, widths: list[int], stem: int = 64) -> dict[str, Tensor]:
    """A file in torchvision's layout, with the classifier that nobody needs."""
    state = {key: fill(key, shape) for key, shape in resnet_shapes(depths, kind, widths, stem).items()}
    torch.save(state | {"fc.weight": torch.zeros(2, widths[-1]), "fc.bias": torch.zeros(2)}, path)
    return state


def shrink(monkeypatch: pytest.MonkeyPatch, name: str, depths: list[int] | None = None) -> dict[str, Any]:
    """The ResNet of this name, an eighth as wide."""
    config = RESNETS[name]
    config = config | {"embedding_size": 8, "hidden_sizes": [w // 8 for w in config["hidden_sizes"]]}
    config["depths"] = depths or config["depths"]
    monkeypatch.setitem(encoders.RESNETS, name, config)
    return config


def test_imagenet_weights_of_a_resnet18_from_torchvisions_file(tmp_path: Path) -> None:
    state = torchvision_file(tmp_path / "resnet18.pth", RESNETS["resnet18"]["depths"], "basic", [64, 128, 256, 512])
    encoder = build_encoder("resnet18", 32, str(tmp_path / "resnet18.pth")).eval()
    x = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = encoder(x)
        assert torch.equal(found, resnet_features(state, x))
    assert found.shape == (2, 512, 3, 2)
    assert found.std() > 0.1


@pytest.mark.parametrize(
    ("name", "depths"), [("resnet34", [3, 4, 6, 3]), ("resnet50", [3, 4, 6, 3]), ("resnet101", [3, 4, 23, 3])]
)
def test_deeper_resnets_from_torchvisions_file(
    name: str, depths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shrink(monkeypatch, name)
    assert config["depths"] == depths
    kind = "basic" if name == "resnet34" else "bottleneck"
    state = torchvision_file(tmp_path / "a.pth", depths, kind, config["hidden_sizes"], 8)
    model = LowerCount(name, pretrained=str(tmp_path / "a.pth"), classes=["a"]).eval()
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = model.network.encoder(x)
        assert torch.equal(found, resnet_features(state, x))
    assert (model.cell, model.network.multiple, found.shape[1]) == (32, 32, config["hidden_sizes"][-1])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("resnet152", 58_143_808),
    ],
)
def test_numbers_of_parameters_are_torchvisions(name: str, parameters: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, 32)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert all(p.requires_grad for p in encoder.parameters())


def test_weights_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shrink(monkeypatch, "resnet18", [1, 1, 1, 1])
    depths, widths = config["depths"], config["hidden_sizes"]
    file = str(tmp_path / "a.pth")
    state = torchvision_file(tmp_path / "a.pth", depths, "basic", widths, 8)
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, file)  # before torch 0.4.1
    assert build_encoder("resnet18", 32, file)
    torch.save({key: value for key, value in state.items() if key != "layer2.0.bn1.bias"}, file)
    with pytest.raises(WeightsError, match=r"stages\.1\.layers\.0"):
        build_encoder("resnet18", 32, file)
    torch.save(state | {"layer2.1.bn1.bias": torch.zeros(16)}, file)
    with pytest.raises(WeightsError, match=r"stages\.1\.layers\.1"):
        build_encoder("resnet18", 32, file)
    torchvision_file(tmp_path / "a.pth", depths, "basic", [w * 2 for w in widths], 8)  # as of a wide one
    with pytest.raises(WeightsError, match=r"\(16, 8, 3, 3\)"):
        build_encoder("resnet18", 32, file)
    torch.save({"features.0.weight": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"features\.0\.weight"):
        build_encoder("resnet18", 32, file)
    with pytest.raises(WeightsError, match=r"b\.pth"):
        build_encoder("resnet18", 32, str(tmp_path / "b.pth"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "resnet19"}, "resnet19"),
        ({"name": "small", "pretrained": "imagenet"}, "'imagenet'"),
        ({"name": TINY["resnet"], "pretrained": "a.pth"}, "a.pth"),
        ({"name": "small", "reduction": 6}, "reduction"),
        ({"name": {"model_type": "nonsense"}}, "nonsense"),
    ],
)
def test_encoders_that_there_are_not(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_encoder(**{"reduction": 8, **options})


# -- any encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", *TINY])
@pytest.mark.parametrize("reduction", [8, 16])
def test_every_encoder_counts_images_of_any_size(kind: str, reduction: int) -> None:
    torch.manual_seed(0)
    model = LowerCount(TINY.get(kind, kind), width=4, reduction=reduction, classes=["a", "b"]).eval()
    for height, width in ((64, 96), (50, 70), (9, 130)):
        with torch.inference_mode():
            found = model(torch.rand(2, 3, height, width), ask([["a", "b"]] * 2))
        for maps in (found.density, found.class_maps, found.raw_density):
            assert maps.shape == (2, 2, -(-height // reduction), -(-width // reduction))
            assert torch.isfinite(maps).all()


@pytest.mark.parametrize("kind", TINY)
def test_a_folder_of_weights_and_a_checkpoint_that_needs_it_no_more(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    body: Any = build_encoder(TINY[kind], 8)
    body.body.save_pretrained(tmp_path / "folder")
    model = LowerCount(f"auto:{tmp_path / 'folder'}", reduction=8, classes=["a", "b"]).eval()
    for key, value in body.state_dict().items():
        assert torch.equal(model.network.encoder.state_dict()[key], value), key  # type: ignore[union-attr]
    image = torch.rand(1, 3, 56, 70)
    with torch.inference_mode():
        expected = model(image, ask([["a", "b"]]))
    save(model, tmp_path / "a.ckpt")
    for file in (tmp_path / "folder").iterdir():
        file.unlink()
    loaded = load(tmp_path / "a.ckpt")
    with torch.inference_mode():
        again = loaded(image, ask([["a", "b"]]))
    assert torch.equal(again.raw_density, expected.raw_density)  # type: ignore[attr-defined]
    assert expected.raw_density.std() > 0


@pytest.mark.parametrize("kind", ["small", *TINY])
@pytest.mark.parametrize("density_branch", ["own", "modulated"])
@pytest.mark.parametrize("first_stage", [0, 99])
def test_every_weight_gets_a_gradient_in_both_stages(kind: str, density_branch: Any, first_stage: int) -> None:
    """Or DDP would wait for it for ever."""
    torch.manual_seed(0)
    model = LowerCount(
        TINY.get(kind, kind),
        width=4,
        reduction=8,
        classes=["a", "b"],
        network=LowerCountConfig(density_branch=density_branch),
        first_stage=first_stage,
    ).train()
    model._trainer = type("Epoch", (), {"current_epoch": 0, "global_step": 0, "world_size": 1})()
    counts = torch.tensor([[2.0, 0.0], [0.0, 9.0]])
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.training_losses(
            {
                "image": torch.rand(2, 3, 64, 64),
                "queries": ask([["a", "b"]] * 2),
                "image_id": ["0", "1"],
                "counts": counts,
            }
        )
    assert {"absent", "present"}.issubset(terms) == (first_stage == 0)
    loss = torch.stack(list(terms.values())).sum()
    assert loss.dtype == torch.float32
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
    idle = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum()]  # type: ignore[union-attr]
    assert all("conv1" in n or "conv2" in n or "lambda" in n for n in idle), idle  # behind a gain of 0 at first


# -- maps, scores and counts ------------------------------------------------------------------------------------------


def by_hand(net: LowerCountNet, image: Tensor) -> LowerCountOutput:
    """The branches of the paper on an encoder's features, one map after the other."""
    s, (b, _, height, width) = net.state_dict(), image.shape
    x = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    whole = torch.zeros(b, 3, -(-height // net.multiple) * net.multiple, -(-width // net.multiple) * net.multiple)
    whole[..., :height, :width] = x
    features = conv2d(net.encoder(whole), s["neck.weight"], s["neck.bias"])
    features = features[..., : -(-height // net.stride), : -(-width // net.stride)]
    maps = []
    for name, x in zip(("class_branch", "density_branch"), features.chunk(2, 1), strict=True):
        if f"{name}.0.weight" in s:
            x = batch_norm(x, *[s[f"{name}.0.{leaf}"] for leaf in NORM])
        maps.append(conv2d(relu(x), s[f"{name}.2.weight"], s[f"{name}.2.bias"]))
    scores = torch.zeros(b, maps[0].shape[1])
    for i in range(b):
        for c, plane in enumerate(maps[0][i]):
            floor = plane.flatten().sort().values[(plane.numel() - 1) // 2]
            peaks = [
                v
                for y, row in enumerate(plane)
                for x, v in enumerate(row)
                if v >= floor and v == plane[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max()
            ]
            scores[i, c] = torch.stack(peaks).mean()
    density = maps[1] / maps[1][0, 0].numel()
    density = density * (scores > 0)[..., None, None] if net.config.gated else density
    return LowerCountOutput(density, maps[0], maps[1], scores)


@pytest.mark.parametrize("options", [{}, {"gated": False}, {"branch_norm": "none"}, {"hidden": 7}], ids=str)
def test_against_the_formulas(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    net = randomised(LowerCountNet(Cells(8, 16), 4, LowerCountConfig(**options)))
    image = torch.rand(2, 3, 44, 61)
    with torch.no_grad():
        found, expected = net(image), by_hand(net, image)
    for name in ("density", "class_maps", "raw_density", "class_scores"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert net.neck.out_channels == 2 * options.get("hidden", 6)  # one and a half channels for each class
    assert found.total_map is None


def test_classes_that_are_not_there_count_nothing() -> None:
    net = randomised(small(8, seed=1))
    image = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        gated = net(image)
        net.config = replace(net.config, gated=False)
        open_ = net(image)
    present = gated.class_scores > 0
    assert present.any()
    assert not present.all()
    assert (gated.counts[~present] == 0).all()
    torch.testing.assert_close(gated.counts[present], open_.counts[present])
    torch.testing.assert_close(open_.counts, open_.raw_density.mean((-2, -1)))  # the reference's count is D's mean
    torch.testing.assert_close(gated.density.sum((-2, -1)), gated.counts)
    assert torch.equal(gated.raw_density, open_.raw_density)
    assert (open_.counts < 0).any()  # D has no activation: counts may be negative


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(4, 4), (8, 8), (8, 16), (16, 32)]))
def test_every_size_gives_every_cell_and_loses_no_pixel(height: int, width: int, kind: tuple[int, int]) -> None:
    stride, multiple = kind
    torch.manual_seed(0)
    net = LowerCountNet(Cells(stride, multiple), 2, LowerCountConfig(branch_norm="none", gated=False, hidden=8)).eval()
    image = torch.rand(1, 3, height, width)
    with torch.no_grad():
        found = net(image)
        assert found.density.shape == (1, 2, -(-height // stride), -(-width // stride))
        moved = image.clone()
        moved[..., -1, -1] += 3
        assert not torch.equal(net(moved).density, found.density)  # the last pixel is seen


def test_padding_is_mean_grey() -> None:
    torch.manual_seed(0)
    net = LowerCountNet(Cells(8, 16), 2, LowerCountConfig(branch_norm="none")).eval()
    image = net.mean.expand(1, 3, 20, 12)
    with torch.no_grad():
        maps = net.class_maps(net.normalised(image))
        assert maps.shape == (1, 2, 3, 2)
        torch.testing.assert_close(maps, maps[..., :1, :1].expand_as(maps))  # nothing but grey, in the padding too
        assert torch.equal(maps, net(image).class_maps)


def test_some_of_the_classes() -> None:
    net = randomised(small(4, density_branch="modulated"))
    with torch.no_grad():
        found = net(torch.rand(2, 3, 32, 40))
    some = found.of(torch.tensor([[3, 0], [1, 1]]))
    for name in ("density", "class_maps", "raw_density", "class_scores"):
        whole, chosen = getattr(found, name), getattr(some, name)
        assert torch.equal(chosen[0], whole[0, [3, 0]])
        assert torch.equal(chosen[1], whole[1, [1, 1]])
    assert some.total_map is found.total_map
    assert torch.equal(some.counts, some.density.sum((-2, -1)))
    one = some.split()[1]
    assert torch.equal(one.class_maps, some.class_maps[1:])
    assert one.total_map is not None
    assert one.total_map.shape == (1, 1, 4, 5)


def test_batch_norm_sees_the_batch_in_training_alone() -> None:
    for norm in ("batch", "none"):
        net = small(branch_norm=norm)
        image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            alone, together = net.eval()(image[:1]), net(image)
            torch.testing.assert_close(alone.raw_density[0], together.raw_density[0])
            alone, together = net.train()(image[:1]), net(image)
            same = torch.allclose(alone.raw_density[0], together.raw_density[0], atol=1e-5)
        assert same == (norm == "none")
        assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == (norm == "batch")


@pytest.mark.parametrize("density_branch", ["own", "modulated"])
def test_maps_are_float32_under_autocast(density_branch: Any) -> None:
    net = randomised(small(density_branch=density_branch))
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = net(image)
    with torch.no_grad():
        exact = net(image)
    for name, value in vars(found).items():
        if value is not None:
            assert value.dtype == torch.float32, name
            expected = getattr(exact, name)
            if name != "density":  # a score near zero may change its sign
                assert (value - expected).abs().max() < 0.05 * expected.abs().max().clamp(min=1), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_classes": 0}, "list"),
        ({"density_branch": "shared"}, "density_branch"),
        ({"branch_norm": "group"}, "branch_norm"),
        ({"radius": 0}, "radius"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        small(**options)


class Counts(nn.Module):
    """What leaves Python: density, class maps and scores."""

    def __init__(self, network: LowerCountNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.network(image)
        return found.density, found.class_maps, found.class_scores


EXPORTED = {
    "modulated": lambda: small(density_branch="modulated"),
    "resnet": lambda: LowerCount(TINY["resnet"], reduction=16, classes=["a", "b"]).network,
}


PICTURES = [(2, 3, 64, 96), (1, 3, 96, 64), (5, 3, 128, 160)]


def exported(kind: str) -> tuple[Counts, Any]:
    """A network and what ``torch.export`` makes of it, for any batch and size."""
    torch.manual_seed(0)
    network = Counts(randomised(EXPORTED[kind]())).eval()
    side = {name: 32 * torch.export.Dim(name, min=2, max=32) for name in ("rows", "columns")}
    free = {"image": {0: torch.export.Dim("batch", min=1, max=64), 2: side["rows"], 3: side["columns"]}}
    return network, torch.export.export(network, (torch.rand(PICTURES[0]),), dynamic_shapes=free, strict=False)


@pytest.mark.parametrize("kind", EXPORTED)
def test_export(kind: str) -> None:
    """I5: the same numbers outside Python."""
    network, program = exported(kind)
    for shape in PICTURES:
        image = torch.rand(shape)
        with torch.no_grad():
            for found, expected in zip(program.module()(image), network(image), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTED)
def test_onnx(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I5, which needs that peaks are found without a median."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    network, program = exported(kind)
    torch.onnx.export(program, (), "model.onnx", dynamo=True)
    session = runtime.InferenceSession("model.onnx")
    for shape in PICTURES:
        image = torch.rand(shape)
        outputs = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        with torch.no_grad():
            for found, expected in zip(outputs, network(image), strict=True):
                torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


# -- classes of which only presence is known --------------------------------------------------------------------------


def test_density_weights_are_made_from_class_weights() -> None:
    net = small(3, density_branch="modulated", gated=False)
    branch = net.density_branch
    assert isinstance(branch, ModulatedDensity)
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = net.eval()(image)
        weight = net.class_branch.get_parameter("2.weight")
        weight[1] *= -2
        after = net(image)
    assert torch.equal(before.raw_density[:, [0, 2]], after.raw_density[:, [0, 2]])
    assert not torch.allclose(before.raw_density[:, 1], after.raw_density[:, 1])
    assert torch.equal(before.total_map, after.total_map)  # type: ignore[arg-type]
    _, second = net.features(net.normalised(image))
    made = branch.modulate(weight.flatten(1))
    features = relu(batch_norm(second, *[branch.norm[0].state_dict()[k] for k in NORM]))
    expected = torch.einsum("bphw,cp->bchw", features, made) + branch.bias
    torch.testing.assert_close(after.raw_density, expected.detach(), rtol=1e-4, atol=1e-5)


def test_counts_do_not_bend_what_presence_teaches() -> None:
    net = small(3, density_branch="modulated").train()
    found = net(torch.rand(2, 3, 32, 32))
    found.raw_density.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in net.class_branch.parameters())
    assert all(p.grad is not None for p in net.density_branch.modulate.parameters())  # type: ignore[union-attr]
    found.class_scores.sum().backward()
    assert net.class_branch.get_parameter("2.weight").grad is not None


def test_modulation_takes_as_many_weights_as_two_layers() -> None:
    own, modulated = (small(20, hidden=30, density_branch=kind) for kind in ("own", "modulated"))
    extra = sum(p.numel() for p in modulated.parameters()) - sum(p.numel() for p in own.parameters())
    # Two layers of 30 x 30, one bias and the map of all objects, in the place of 20 classes' weights.
    assert extra == 2 * (30 * 30 + 30) + 1 + 31 - 20 * 31
