"""The transport term against a second implementation with the whole kernel, picture by picture."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import BENCHMARKS, GOLDEN
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc import loss as transport
from counting_zoo.models.clip_ebc.loss import transport_gradient, transport_loss, transport_potentials

GOLDEN_FILE = GOLDEN / "clip_ebc_vectors.pt"
BENCHMARK = BENCHMARKS / "transport.py"


def squared_distances(points: Tensor, shape: Sequence[int], cell: int, dtype: torch.dtype) -> Tensor:
    """``(N, h * w)``, expanded in float32 as the reference has it."""
    y, x = (torch.arange(n) * cell + cell / 2 for n in shape)
    along_x = -2 * points[:, :1] * x + points[:, :1] ** 2 + x * x
    along_y = -2 * points[:, 1:] * y + points[:, 1:] ** 2 + y * y
    return (along_y.to(dtype)[:, :, None] + along_x.to(dtype)[:, None]).flatten(1)


def potentials_of_one(
    points: Tensor, density: Tensor, cell: int, *, iterations: int = 100, tolerance: float = 1e-9, epsilon: float = 10.0
) -> tuple[Tensor, int]:
    """Sinkhorn with the whole kernel in float32: potentials of the cells, and how many iterations it took."""
    kernel = (squared_distances(points, density.shape, cell, torch.float32) / -epsilon).exp()
    mass = (density / density.sum()).flatten()
    u, n = torch.full((len(points),), 1 / len(points)), 0
    for n in range(1, iterations + 1):
        v = mass / (kernel.T @ u + 1e-16)
        u = 1 / len(points) / (kernel @ v + 1e-16)
        if n % 10 == 0 and float(((kernel.T @ u) * v - mass).square().sum()) <= tolerance:
            break
    return (epsilon * (v + 1e-16).log()).reshape(density.shape), n


def close(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def random_case(numbers: list[int], shape: tuple[int, int], cell: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(seed)
    size = torch.tensor([shape[1] * cell, shape[0] * cell], dtype=torch.float32)
    return [torch.rand(n, 2) * size for n in numbers], torch.rand(len(numbers), *shape) * 0.3 + 0.01


# -- the plain iteration ----------------------------------------------------------------------------------------------


def test_reference_potentials() -> None:
    stored = torch.load(GOLDEN_FILE, weights_only=True)["sinkhorn"]
    found = transport_potentials([stored["points"]], stored["prob"].reshape(1, 8, 8), 8)
    assert close(found.flatten(), stored["beta"]) < 1e-6


@pytest.mark.parametrize(
    ("numbers", "shape", "cell"),
    [
        ([1], (28, 28), 8),
        ([60], (28, 28), 8),
        ([800], (56, 56), 8),
        ([40], (9, 23), 16),
        ([7, 1, 0, 90, 0, 33], (12, 10), 8),
        ([5, 6, 300], (10, 12), 32),
    ],
)
def test_against_the_whole_kernel(numbers: list[int], shape: tuple[int, int], cell: int) -> None:
    points, density = random_case(numbers, shape, cell)
    found = transport_potentials(points, density, cell)
    assert found.shape == density.shape
    for i, own in enumerate(points):
        if len(own):
            assert close(found[i], potentials_of_one(own, density[i], cell)[0]) < 5e-6
        else:
            assert not found[i].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_any_small_case(height: int, width: int, numbers: list[int], seed: int) -> None:
    points, density = random_case(numbers, (height, width), 8, seed)
    found = transport_gradient(density[:, None], points, 8)
    for i, own in enumerate(points):
        expected = torch.zeros(height, width)
        if len(own):
            total, beta = density[i].sum(), potentials_of_one(own, density[i], 8)[0]
            expected = (total * beta - (beta * density[i]).sum()) / (total**2 + 1e-8)
        assert float((found[i, 0] - expected).abs().max()) <= 1e-3 + 1e-4 * float(expected.abs().max())


def test_points_that_coincide_and_points_on_the_border() -> None:
    points = torch.tensor([[20.0, 20.0]] * 5 + [[0.0, 0.0], [96.0, 80.0], [96.0, 0.0], [0.0, 80.0], [48.0, 80.0]])
    density = random_case([1], (10, 12), 8)[1]
    found = transport_potentials([points], density, 8)
    assert close(found[0], potentials_of_one(points, density[0], 8)[0]) < 5e-6


@pytest.mark.parametrize("together", [True, False])
def test_a_image_stops_by_itself(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps the potentials of its own last iteration, which is another one for every picture."""
    monkeypatch.setattr(transport, "PADDING", math.inf if together else 1.0)
    points, density = random_case([30, 50, 4, 100, 1], (6, 6), 8)
    expected = [potentials_of_one(own, map_, 8, tolerance=1e-5) for own, map_ in zip(points, density, strict=True)]
    final = [potentials_of_one(own, map_, 8, tolerance=0)[0] for own, map_ in zip(points, density, strict=True)]
    assert len({n for _, n in expected}) >= 3
    assert sum(bool(close(beta, last) > 1e-3) for (beta, _), last in zip(expected, final, strict=True)) >= 2
    found = transport_potentials(points, density, 8, tolerance=1e-5)
    for i, (beta, _) in enumerate(expected):
        assert close(found[i], beta) < 5e-6
    alone = [transport_potentials([p], d[None], 8, tolerance=1e-5)[0] for p, d in zip(points, density, strict=True)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-3)


def test_everybody_done_ends_the_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    class Counted(transport.Sinkhorn):
        def step(self) -> None:
            steps.append(1)
            super().step()

    monkeypatch.setattr(transport, "Sinkhorn", Counted)
    transport_potentials([torch.tensor([[4.0, 4.0]])], torch.ones(1, 1, 2), 8)
    assert len(steps) == 10


@pytest.mark.parametrize("log_domain", [False, True])
def test_without_points_nothing_moves(log_domain: bool) -> None:
    density = torch.rand(3, 1, 4, 4, requires_grad=True)
    nothing = [torch.zeros(0, 2)] * 3
    value = transport_loss(density, nothing, 8, log_domain=log_domain)
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert density.grad is not None
    assert not density.grad.any()
    assert transport_loss(density[:0], [], 8).shape == (0,)


@pytest.mark.parametrize("log_domain", [False, True])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_density_without_mass_warns_and_leaves_its_neighbours_alone(log_domain: bool, bad: float) -> None:
    points, density = random_case([6, 5, 6], (5, 4), 8)
    expected = transport_potentials(points, density, 8, log_domain=log_domain)
    density[1] = bad
    with pytest.warns(UserWarning, match="transport"):
        found = transport_potentials(points, density, 8, log_domain=log_domain)
    assert not found[1].any()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-4)
    if not bad:
        with pytest.warns(UserWarning, match="transport"):
            gradient = transport_gradient(density[:, None], points, 8, log_domain=log_domain)
        assert gradient.isfinite().all()
        assert not gradient[1].any()


@pytest.mark.parametrize("log_domain", [False, True])
def test_cells_without_mass_and_negative_cells(log_domain: bool) -> None:
    """A rectified density is exactly zero in most cells; a negative one counts as zero."""
    points, density = random_case([9], (6, 6), 8)
    density[0, :, 2:] = 0
    found = transport_potentials(points, density, 8, log_domain=log_domain)
    assert found.isfinite().all()
    torch.testing.assert_close(
        transport_potentials(points, torch.where(density == 0, -1.0, density), 8, log_domain=log_domain), found
    )


@pytest.mark.parametrize("tiny", [1e-30, 1e-44, 1e30])
def test_masses_of_any_scale_stay_finite(tiny: float) -> None:
    points, density = random_case([9], (6, 6), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert transport_gradient(density[:, None] * tiny, points, 8).isfinite().all()


def test_gradient_is_the_formula_and_the_value_is_rounding() -> None:
    points, density = random_case([70, 0, 12], (14, 14), 8)
    leaf = density[:, None].clone().requires_grad_()
    value = transport_loss(leaf, points, 8)
    value.sum().backward()
    beta, total = transport_potentials(points, density, 8), density.sum((1, 2), keepdim=True)
    formula = beta * total / (total**2 + 1e-8) - (beta * density).sum((1, 2), keepdim=True) / (total**2 + 1e-8)
    assert leaf.grad is not None
    assert close(leaf.grad[:, 0], formula) < 1e-5
    assert float(value.detach().abs().max()) < 1e-3
    assert float(leaf.grad.abs().max()) > 1


def test_autocast_half_precision_and_fast_products_change_nothing() -> None:
    points, density = random_case([40, 3], (12, 12), 8)
    density = density.bfloat16()
    expected = transport_gradient(density[:, None].float(), points, 8)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = transport_gradient(density[:, None], points, 8)
            assert transport_loss(density[:, None], points, 8).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_true_float32(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 keeps ten bits of the kernel; Lightning advises everybody to switch it on."""
    seen: list[str] = []

    def now() -> list[str]:
        backends = torch.backends
        return [backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision]  # type: ignore[attr-defined]

    class Watched(transport.Sinkhorn):
        def step(self) -> None:
            seen.extend(now())
            super().step()

    monkeypatch.setattr(transport, "Sinkhorn", Watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        outside = now()
        transport_potentials([torch.ones(1, 2)], torch.ones(1, 2, 2), 8, iterations=1)
        assert now() == outside
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize("iterations", [1, 7, 13])
def test_iterations_between_two_checks(iterations: int) -> None:
    points, density = random_case([20], (8, 9), 8)
    expected, _ = potentials_of_one(points[0], density[0], 8, iterations=iterations)
    assert close(transport_potentials(points, density, 8, iterations=iterations)[0], expected) < 5e-6


def test_no_tensor_of_points_times_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in ([out] if isinstance(out, Tensor) else []))
            return out

    points, density = random_case([200, 200, 0], (20, 20), 8)
    with Watch():
        transport_potentials(points, density, 8, iterations=2)
    assert 0 < max(sizes) <= 3 * 200 * 20
    monkeypatch.setattr(transport, "CHUNK", 2 * 200 * 20 * 4)
    sizes.clear()
    with Watch():
        transport_potentials(points, density, 8, iterations=2, log_domain=True)
    assert max(sizes) <= 2 * 200 * 20 * 4  # four rows of cells at a time


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"epsilon": 0.0}, "epsilon"), ({"iterations": 0}, "iterations"), ({"cell": 0}, "cell")],
)
def test_settings_out_of_range(changes: dict[str, float], named: str) -> None:
    arguments = {"cell": 8, "epsilon": 10.0, "iterations": 100} | changes
    with pytest.raises(InputError, match=named):
        transport_potentials([torch.ones(1, 2)], torch.ones(1, 2, 2), **arguments)  # type: ignore[arg-type]


def test_points_of_another_batch() -> None:
    with pytest.raises(InputError, match=r"\(1, 2, 2\)"):
        transport_potentials([torch.ones(1, 2)] * 2, torch.ones(1, 2, 2), 8)


# -- the logarithmic domain -------------------------------------------------------------------------------------------


def plan(points: Tensor, density: Tensor, beta: Tensor, cell: int, epsilon: float = 10.0) -> Tensor:
    """Transport plan in float64 that these potentials of the cells belong to; its rows sum to 1 / N."""
    logits = (beta.double().flatten() - squared_distances(points, density.shape, cell, torch.float64)) / epsilon
    return logits.softmax(1) / len(points)


def test_log_domain_equals_the_plain_one_where_nothing_underflows() -> None:
    points, density = random_case([30, 8, 0], (8, 6), 8)
    plain = transport_potentials(points, density, 8, epsilon=200.0)
    logs = transport_potentials(points, density, 8, epsilon=200.0, log_domain=True)
    torch.testing.assert_close(logs, plain, rtol=1e-4, atol=0.05)
    assert float(plain.abs().max()) > 300


def test_log_domain_brings_all_the_mass_where_the_plain_one_cannot() -> None:
    points, density = random_case([12], (8, 8), 8)
    points[0] = points[0] / 4  # all in one corner: the far cells are 60 pixels away
    mass = (density[0] / density[0].sum()).double().flatten()

    def error(log_domain: bool) -> float:
        beta = transport_potentials(points, density, 8, iterations=3000, tolerance=1e-12, log_domain=log_domain)
        return float((plan(points[0], density[0], beta[0], 8).sum(0) - mass).abs().sum())

    assert error(log_domain=True) < 1e-3
    assert error(log_domain=False) > 0.1


@pytest.mark.parametrize("iterations", [1, 2, 9, 100])
def test_log_domain_against_sums_of_exponentials_in_float64(iterations: int) -> None:
    points, density = random_case([40, 1, 13], (15, 12), 8)
    density[0, :, :5] = 0
    found = transport_potentials(points, density, 8, iterations=iterations, tolerance=0.0, log_domain=True)
    for i, own in enumerate(points):
        logs = squared_distances(own, density.shape[1:], 8, torch.float64) / -10
        mass = (density[i].double() / density[i].sum()).clamp(min=1e-16).log().flatten()
        u = torch.full((len(own),), -math.log(len(own)), dtype=torch.float64)
        for _ in range(iterations):
            v = mass - (logs + u[:, None]).logsumexp(0)
            u = -math.log(len(own)) - (logs + v).logsumexp(1)
        assert close(found[i].flatten().double(), 10 * v) < 1e-5


def test_log_domain_in_closed_form() -> None:
    """One point sends each cell its mass: beta is the cost plus epsilon * log(mass), up to a constant."""
    density = torch.rand(1, 5, 7) + 0.1
    point = torch.tensor([[9.0, 30.0]])
    beta = transport_potentials([point], density, 8, log_domain=True).flatten()
    expected = squared_distances(point, (5, 7), 8, torch.float32)[0] + 10 * density.flatten().log()
    torch.testing.assert_close(beta - beta.mean(), expected - expected.mean(), rtol=1e-5, atol=1e-2)


def test_log_domain_pulls_mass_towards_far_points() -> None:
    """One head at the right end, all predicted at the left: more density must be cheapest beside the head."""
    density = torch.full((1, 1, 1, 28), 1e-3)
    density[..., 0] = 1
    gradient = transport_gradient(density, [torch.tensor([[220.0, 4.0]])], 8, log_domain=True)[0, 0, 0]
    assert int(gradient[1:].argmin()) == 26
    assert gradient[0] > gradient[-1]


def test_benchmark_runs_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_transport", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    *_, value, gradient = module.compare([20, 90], repeats=1, side=96)
    assert value < 1e-3
    assert gradient < 1e-4
    module.main(["--repeats", "1", "--side", "64"])
    assert "8 x 100 to 800 points" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("log_domain", [False, True])
def test_on_cuda_as_on_the_cpu(log_domain: bool) -> None:
    points, density = random_case([60, 0, 400, 1], (28, 28), 8)
    expected = transport_gradient(density[:, None], points, 8, log_domain=log_domain)
    on_device = [own.cuda() for own in points]
    found = transport_gradient(density[:, None].cuda(), on_device, 8, log_domain=log_domain).cpu()
    np.testing.assert_allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
