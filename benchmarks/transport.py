"""Time of the transport term: picture by picture with the whole kernel, as the reference does it, and ours.

    python benchmarks/transport.py

On one core, crops of 448 pixels, cells of 8 pixels, 100 iterations. The last two columns are the largest difference of
the value of the term, and of its gradient as a share of the largest gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from counting_zoo.models.clip_ebc.loss import transport_loss

SIDE, CELL = 448, 8  # pixels
EPSILON, ITERATIONS, TOLERANCE, TINY = 10.0, 100, 1e-9, 1e-16


def whole_kernel_loss(density: Tensor, points: Sequence[Tensor]) -> Tensor:
    """The same term with a kernel of points x cells, one picture after the other, checked in each iteration.

    Args:
        density: ``(B, 1, h, w)``.
        points: B tensors ``(N_i, 2)`` of x, y in pixels.

    Returns:
        ``(B,)``.
    """
    centre = torch.arange(density.shape[-1]) * CELL + CELL / 2
    values = []
    for own, map_ in zip(points, density[:, 0], strict=True):
        x, y = own[:, :1], own[:, 1:]
        cost_x = -2 * x @ centre[None] + x * x + centre * centre
        cost_y = -2 * y @ centre[None] + y * y + centre * centre
        cost = (cost_y[:, :, None] + cost_x[:, None]).flatten(1)  # (N, h * w)
        beta = potential_of_cells(cost, (map_ / map_.sum()).detach().flatten()).view_as(map_)
        flat, total = map_.detach(), map_.detach().sum()
        scale = 1 / (total * total + 1e-8)
        values.append((map_ * (total * scale * beta - (flat * beta).sum() * scale)).sum())
    return torch.stack(values)


def potential_of_cells(cost: Tensor, mass: Tensor) -> Tensor:
    """Sinkhorn's iterations with ``cost (N, M)`` from equal points to cells of ``mass (M,)``; ``(M,)``."""
    n, m = cost.shape
    kernel = torch.exp(cost / -EPSILON)
    supply, u, v = torch.full((n,), 1 / n), torch.full((n,), 1 / n), torch.full((m,), 1 / m)
    for iteration in range(1, ITERATIONS + 1):
        before = u, v
        v = mass / (u @ kernel + TINY)
        u = supply / (kernel @ v + TINY)
        if any(bool(torch.any(wrong)) for wrong in (u.isnan(), v.isnan(), u.isinf(), v.isinf())):
            u, v = before
            break
        if iteration % 10 == 0:
            error = float((u @ kernel * v - mass).square().sum())
            if error <= TOLERANCE:
                break
    return EPSILON * torch.log(v + TINY)


def batched_loss(density: Tensor, points: Sequence[Tensor]) -> Tensor:
    """Ours, with the same settings."""
    return transport_loss(density, points, CELL, epsilon=EPSILON, iterations=ITERATIONS, tolerance=TOLERANCE)


def scene(numbers: Sequence[int], side: int = SIDE) -> tuple[Tensor, list[Tensor]]:
    """Pictures with so many points, in clusters, and densities that have found about half of them."""
    random = torch.Generator().manual_seed(sum(numbers))
    cells, points, maps = side // CELL, [], []
    for number in numbers:
        centre = torch.rand(12, 2, generator=random)[torch.randint(12, (number,), generator=random)]
        spread = torch.randn(number, 2, generator=random) * 0.06
        own = ((centre + spread).clamp(0, 0.999) * side).float()
        points.append(own)
        column, row = (own[::2] / CELL).long().unbind(1)
        background = torch.rand(cells, cells, generator=random) * number / cells**2
        maps.append(background.flatten().index_add(0, row * cells + column, torch.ones(len(row))).view(cells, cells))
    return torch.stack(maps)[:, None], points


def compare(numbers: Sequence[int], repeats: int, side: int = SIDE) -> tuple[float, float, float, float]:
    """Median seconds of the reference's way and of ours, in turns, and the largest differences (see the module)."""
    density, points = scene(numbers, side)
    seconds: dict[Callable[[Tensor, Sequence[Tensor]], Tensor], list[float]] = {whole_kernel_loss: [], batched_loss: []}
    values, gradients = [], []
    for repeat in range(repeats + 1):
        for loss, taken in seconds.items():
            leaf = density.clone().requires_grad_()
            start = time.perf_counter()
            value = loss(leaf, points)
            value.sum().backward()
            taken.append(time.perf_counter() - start)
            if repeat == 0:
                assert leaf.grad is not None
                taken.clear()  # the first run is slower
                values.append(value.detach())
                gradients.append(leaf.grad)
    theirs, ours = (statistics.median(taken) for taken in seconds.values())
    difference = float((gradients[1] - gradients[0]).abs().max() / gradients[0].abs().max())
    return theirs, ours, float((values[1] - values[0]).abs().max()), difference


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time of the transport term, the reference's way and ours.")
    parser.add_argument("--repeats", type=int, default=9, help="runs of which the median is printed")
    parser.add_argument("--side", type=int, default=SIDE, help="of a crop, in pixels")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: dict[str, list[int]] = {f"{n} points": [n] for n in (100, 300, 800)}
    rows["8 x 300 points"] = [300] * 8
    rows["8 x 100 to 800 points"] = list(range(100, 801, 100))
    print(f"{'crops':<22} {'reference':>10} {'ours':>10} {'ratio':>6} {'value':>8} {'gradient':>9}")
    for name, numbers in rows.items():
        theirs, ours, value, gradient = compare(numbers, options.repeats, options.side)
        times = f"{theirs * 1e3:>7.1f} ms {ours * 1e3:>7.1f} ms {theirs / ours:>5.1f}x"
        print(f"{name:<22} {times} {value:>8.0e} {gradient:>9.0e}")


if __name__ == "__main__":
    main()
