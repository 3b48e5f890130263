"""Losses of blockwise counters: DACE, the zero-inflated Poisson head's, and optimal transport."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence

from counting_zoo.errors import InputError

TINY = 1e-16  # the reference adds it wherever it divides or takes a logarithm (losses/bregman_pytorch.py)


CHECK_EVERY = 10  # iterations


LOWEST = -87.0  # below it, the exponential in float32 is denormal or zero, which takes a CPU ten times as long


CHUNK = 2**22  # numbers of the largest tensor in the logarithmic domain: 16 MB


PADDING = 1.5  # on the CPU, images share a batch while the fullest has at most this many times the points of another


def transport_loss(
    density: Tensor,
    points: Sequence[Tensor],
    cell: int,
    *,
    epsilon: float = 10.0,
    iterations: int = 100,
    tolerance: float = 1e-9,
    log_domain: bool = False,
) -> Tensor:
    """Compute the transport term of DM-Count for each image (Wang et al., NeurIPS 2020).

    Its gradient with respect to the density is :func:`transport_gradient`. Its value is the inner product of the two,
    which is zero up to rounding, whatever the density: what is left is the noise of a difference of large numbers.

    Args:
        density: ``(B, 1, h, w)`` predicted objects per cell.
        points: B tensors ``(N_i, 2)`` of x, y in pixels.
        cell: side of a cell in pixels.
        epsilon: strength of the entropic regularisation, in squared pixels.
        iterations: of Sinkhorn, at most.
        tolerance: an image is done when the squared distance of its column marginal to the normalised density is at
            most this; looked at every ten iterations.
        log_domain: see :func:`transport_potentials`.

    Returns:
        ``(B,)`` float32; an image without points has 0, and a gradient of 0.

    Raises:
        InputError: see :func:`transport_potentials`.
    """
    gradient = transport_gradient(
        density, points, cell, epsilon=epsilon, iterations=iterations, tolerance=tolerance, log_domain=log_domain
    )
    return (density.float() * gradient).sum((1, 2, 3))


@torch.no_grad()
def transport_gradient(
    density: Tensor,
    points: Sequence[Tensor],
    cell: int,
    *,
    epsilon: float = 10.0,
    iterations: int = 100,
    tolerance: float = 1e-9,
    log_domain: bool = False,
) -> Tensor:
    """Compute the gradient of the transport cost with respect to the density that is not normalised.

    With S the sum of the density and beta the potential of the cells, ``S / (S^2 + 1e-8) * beta - <beta, density> /
    (S^2 + 1e-8)``. Arguments and errors are those of :func:`transport_loss`.

    Returns:
        ``(B, 1, h, w)`` float32, without a graph.
    """
    density = density.detach().float()
    beta = transport_potentials(
        points,
        density[:, 0],
        cell,
        epsilon=epsilon,
        iterations=iterations,
        tolerance=tolerance,
        log_domain=log_domain,
    )[:, None]
    total = density.sum((1, 2, 3), keepdim=True)
    scale = 1 / (total.square() + 1e-8)
    return total * scale * beta - (beta * density).sum((1, 2, 3), keepdim=True) * scale


@torch.no_grad()
def transport_potentials(
    points: Sequence[Tensor],
    density: Tensor,
    cell: int,
    *,
    epsilon: float = 10.0,
    iterations: int = 100,
    tolerance: float = 1e-9,
    log_domain: bool = False,
) -> Tensor:
    """Compute dual potentials of the cells, by Sinkhorn's iterations between the points and the normalised density.

    The plain iteration in float32 repeats the reference's arithmetic. It does not solve the problem on real crops:
    the kernel of a cell further than about 32 pixels from a point is zero (epsilon 10), so mass beyond that stays
    where it is and the potentials of such cells are near ``epsilon * log(1e16)`` = 368. The logarithmic domain has
    no such limit; it takes N * h * w exponentials in each iteration, 5 to 40 times as long on a CPU. Use it for new
    training only: its gradients differ.

    Everything runs in float32, under autocast and with TF32 switched on too. On CUDA the host waits once, at the end.

    Args:
        points: B tensors ``(N_i, 2)`` of x, y in pixels.
        density: ``(B, h, w)``, at least 0; negative cells carry no mass.
        cell: side of a cell in pixels.
        epsilon: strength of the entropic regularisation, in squared pixels.
        iterations: at most.
        tolerance: of the squared error of the column marginal, looked at every ten iterations, for each image.
        log_domain: iterate on logarithms.

    Returns:
        ``(B, h, w)`` float32 in squared pixels: 0 for images without points, and, with a warning, for those whose
        density has no mass or is not finite.

    Raises:
        InputError: a setting out of its range, or points and density of different numbers of images.

    Example:
        >>> transport_potentials([torch.tensor([[4.0, 4.0]])], torch.ones(1, 1, 2), 8).round()
        tensor([[[-7., 57.]]])
    """
    if epsilon <= 0 or iterations < 1 or cell <= 0:
        raise InputError(f"transport with {epsilon=}, {iterations=}, {cell=}; expected all of them above 0")
    if density.dim() != 3 or len(points) != len(density):
        raise InputError(
            f"points of {len(points)} images for a density of shape {tuple(density.shape)}; "
            "expected (B, h, w) and one tensor of points for each of the B images"
        )
    beta = [torch.zeros(density.shape[1:], device=density.device)] * len(points)
    solved = []
    with torch.autocast(density.device.type, enabled=False), _true_float32():
        for group in _groups([len(p) for p in points], together=density.is_cuda):
            own = [points[i].reshape(-1, 2).to(density.device, torch.float32) for i in group]
            mass, usable = _probabilities(torch.stack([density[i] for i in group]))
            solver = (LogSinkhorn if log_domain else Sinkhorn)(own, mass, cell, epsilon)
            for i, potential in zip(group, _solve(solver, usable, iterations, tolerance), strict=True):
                beta[i] = potential
            solved.append(usable)
    if solved and not bool(torch.cat(solved).all()):
        warnings.warn(
            "the transport term left out images whose predicted density has no mass or is not finite; "
            "if this goes on, the model predicts zero everywhere or diverges",
            stacklevel=2,
        )
    return torch.stack(beta) if beta else torch.zeros(density.shape, device=density.device)


class Sinkhorn:
    """Scaling iterations with the separable kernel; the scalings u of the points and v of the cells are at most 1e16.

    With masses of at least 0 no iterate overflows, so the reference's checks for NaN and infinity in each iteration
    can fail only in the first one, for a density that :func:`transport_potentials` recognises beforehand.

    Args:
        points: B tensors ``(N_i, 2)``, each with at least one point.
        mass: ``(B, h, w)`` normalised densities.
        cell: side of a cell in pixels.
        epsilon: in squared pixels.
    """

    def __init__(self, points: Sequence[Tensor], mass: Tensor, cell: int, epsilon: float) -> None:
        cost_y, cost_x, self.supply = _costs(points, mass, cell)
        self.mass, self.epsilon = mass, epsilon
        # Denormal numbers are many times slower, and this small they are lost beside TINY.
        self.ky, self.kx = (  # (B, N, h), (B, N, w)
            _exp(cost / -epsilon).masked_fill_(cost > -LOWEST * epsilon, 0.0) for cost in (cost_y, cost_x)
        )
        self.ky_t = self.ky.mT.contiguous()  # (B, h, N)
        self.u, self.v = self.supply.clone(), torch.empty_like(mass)
        self._scaled, self._rows = torch.empty_like(self.ky_t), torch.empty_like(self.kx)  # (B, h, N), (B, N, w)
        self._columns = self._transport_columns()

    def step(self) -> None:
        """Iterate once: v from u, then u from v."""
        torch.div(self.mass, self._columns.add_(TINY), out=self.v)
        torch.bmm(self.ky, self.v, out=self._rows)
        torch.div(self.supply, self._rows.mul_(self.kx).sum(-1).add_(TINY), out=self.u)
        self._columns = self._transport_columns()

    def marginal(self) -> Tensor:
        """Compute the mass that the plan brings to each cell, ``(B, h, w)``."""
        return self._columns * self.v

    def potential(self) -> Tensor:
        """Return the potential, ``(B, h, w)`` in squared pixels."""
        return self.epsilon * (self.v + TINY).log_()

    def _transport_columns(self) -> Tensor:
        torch.mul(self.ky_t, self.u[:, None], out=self._scaled)
        return torch.bmm(self._scaled, self.kx)


class LogSinkhorn:
    """The iterations of :class:`Sinkhorn` on logarithms, which nothing underflows; a cell has a mass of at least 1e-16.

    From the second iteration on, each cell and each point hold a share of the plan that float32 can tell from zero: at
    least the cell's mass over the number of points, and the point's mass times the smallest cell's. Scaling the plan
    is then as exact as logarithms of sums of exponentials, and takes one exponential where those take two and a
    maximum. The plan is made a few rows of cells at a time and never kept.

    Args:
        points: B tensors ``(N_i, 2)``, each with at least one point.
        mass: ``(B, h, w)`` normalised densities.
        cell: side of a cell in pixels.
        epsilon: in squared pixels.
    """

    def __init__(self, points: Sequence[Tensor], mass: Tensor, cell: int, epsilon: float) -> None:
        cost_y, cost_x, supply = _costs(points, mass, cell)
        self.mass, self.epsilon = mass, epsilon
        self.ky, self.kx = cost_y / -epsilon, cost_x / -epsilon  # (B, N, h), (B, N, w)
        self.supply = supply.log()  # -inf for padded points, and so is their u
        self.u, self.v = self.supply, torch.zeros_like(mass)
        rows = max(1, CHUNK // (supply.numel() * mass.shape[2]))
        self._chunks = [slice(i, i + rows) for i in range(0, mass.shape[1], rows)]
        self._started = False

    def step(self) -> None:
        """Iterate once: v from u, then u from v."""
        wanted = self.mass.clamp(min=TINY)
        if not self._started:
            self._started = True
            self.v = wanted.log() - torch.cat([self._exponents(rows).logsumexp(1) for rows in self._chunks], 1)
            over_x = [(self.kx[:, :, None] + self.v[:, None, rows]).logsumexp(-1) for rows in self._chunks]
            self.u = self.supply - (torch.cat(over_x, -1) + self.ky).logsumexp(-1)
            return
        brought, moved = torch.zeros_like(self.supply), torch.empty_like(self.v)
        for rows in self._chunks:
            plan = _exp(self._exponents(rows))  # (B, N, rows, w)
            ratio = wanted[:, rows] / plan.sum(1)
            moved[:, rows] = ratio.log()
            brought += (plan.flatten(2) @ ratio.flatten(1)[..., None])[..., 0]
        self.v = self.v + moved
        self.u = self.u + self.supply - brought.log()

    def marginal(self) -> Tensor:
        """Compute the mass that the plan brings to each cell, ``(B, h, w)``."""
        return torch.cat([_exp(self._exponents(rows)).sum(1) for rows in self._chunks], 1)

    def potential(self) -> Tensor:
        """Return the potential, ``(B, h, w)`` in squared pixels."""
        return self.epsilon * self.v

    def _exponents(self, rows: slice) -> Tensor:
        """Compute the logarithm of the plan between all points and some rows of cells, ``(B, N, rows, w)``."""
        along_y = self.ky[:, :, rows, None] + self.u[:, :, None, None]
        return (along_y + self.kx[:, :, None]).add_(self.v[:, None, rows])


def _exp(exponents: Tensor) -> Tensor:
    """Exponentiate in place; what would be less than 1.6e-38 is that."""
    return exponents.clamp_(min=LOWEST).exp_()


def _solve(solver: Sinkhorn | LogSinkhorn, usable: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Iterate; the potential of each image is that of the check which found it done, whatever its neighbours do."""
    running, beta = usable, torch.zeros_like(solver.mass)
    for iteration in range(1, iterations + 1):
        solver.step()
        if iteration % CHECK_EVERY and iteration < iterations:
            continue
        beta = torch.where(running[:, None, None], solver.potential(), beta)
        running = running & ((solver.mass - solver.marginal()).square().sum((1, 2)) > tolerance)
        if not running.is_cuda and not bool(running.any()):
            break
    return beta


def _groups(lengths: Sequence[int], together: bool) -> list[list[int]]:
    """Group images that share a batch: those with points, all of them or such that little is padded.

    Example:
        >>> _groups([800, 0, 100, 120, 700], together=False)
        [[2, 3], [4, 0]]
    """
    groups: list[list[int]] = []
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lengths.__getitem__):
        if groups and (together or lengths[i] <= PADDING * lengths[groups[-1][0]]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _costs(points: Sequence[Tensor], mass: Tensor, cell: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute squared distances along y ``(B, N, h)`` and x ``(B, N, w)``, and the mass of each point ``(B, N)``.

    The square is expanded, term by term as the reference does it (losses/ot_loss.py): its rounding is part of what
    official results contain. Padded points have no mass.
    """
    padded = pad_sequence(list(points), batch_first=True)  # (B, N, 2)
    supply = pad_sequence([p.new_full((len(p),), 1 / len(p)) for p in points], batch_first=True)
    height, width = mass.shape[-2:]
    costs = []
    for position, n in ((padded[..., 1:], height), (padded[..., :1], width)):
        centre = torch.arange(n, device=mass.device, dtype=mass.dtype) * cell + cell / 2
        costs.append(-2 * position * centre + position * position + centre * centre)
    return costs[0], costs[1], supply


def _probabilities(density: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise densities to sum to one, ``(B, h, w)``, and tell ``(B,)`` where that is possible; others are zero."""
    mass = density.float().clamp(min=0)
    total = mass.sum((1, 2))
    usable = total.isfinite() & (total > 0)
    return torch.where(usable[:, None, None], mass / total[:, None, None], 0.0), usable


@contextmanager
def _true_float32() -> Iterator[None]:
    """Switch off TF32 and bfloat16 in matrix products, which :func:`torch.set_float32_matmul_precision` switches on."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # Only what is switched on is touched: mixed with the older functions, these attributes make their readers raise.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    saved = [(one, one.fp32_precision) for one in backends if one.fp32_precision not in ("ieee", "none")]
    try:
        for backend, _ in saved:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in saved:
            backend.fp32_precision = precision


SMALL = 1e-8  # the reference adds it inside every logarithm


def zip_nll(zero_logits: Tensor, rate: Tensor, counts: Tensor) -> Tensor:
    """Compute the negative log-likelihood of counts under a Poisson distribution whose zeros are inflated.

    With p the probability that a block can hold objects, and r their rate: ``-log(1 - p + p * exp(-r))`` for an empty
    block, ``-log(p) - y * log(r) + r`` for one with y objects. The constant ``log(y!)`` is left out, as the reference
    does, so values compare between models on the same data only.

    Args:
        zero_logits: ``(B, 2, h, w)``: structurally empty, and not.
        rate: ``(B, 1, h, w)``, at least 0.
        counts: ``(B, 1, h, w)`` true counts.
    """
    empty, filled = zero_logits.float().softmax(1).split(1, dim=1)  # (B, 1, h, w) each
    rate, counts = rate.float(), counts.float()
    none = -(empty + filled * (-rate).exp() + SMALL).log()
    some = rate - counts * (rate + SMALL).log() - (filled + SMALL).log()
    return torch.where(counts > 0, some, none).sum() / len(rate)


def positive_bins_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Compute the cross-entropy of the bins of blocks that are not empty; 0, with a gradient of 0, where all are.

    Args:
        logits: ``(B, n - 1, h, w)`` of the bins from 1 on; bin 0 holds the empty blocks and has no logit.
        classes: ``(B, h, w)`` int64 in 0 to n - 1, the bin of each block among all n.
    """
    return cross_entropy(logits.float(), classes - 1, ignore_index=-1, reduction="sum") / len(logits)


def multiscale_mae(
    density: Tensor, counts: Tensor, *, scales: Sequence[int] = (1, 2, 4), weights: Sequence[float] = (0.25, 0.5, 1.0)
) -> Tensor:
    """Sum, over scales and weighted, the absolute errors of mean counts in squares of ``scale`` blocks a side.

    Where a square reaches beyond the map, the blocks outside count as zeros in both maps.

    Args:
        density: ``(B, 1, h, w)`` predicted.
        counts: ``(B, 1, h, w)`` true.
        scales: sides of the squares in blocks.
        weights: one for each scale. The reference's double from one scale to the next.

    Raises:
        InputError: as many weights as scales are needed, and scales of at least 1.
    """
    if len(scales) != len(weights) or not scales or min(scales) < 1:
        raise InputError(
            f"multiscale_mae with scales {list(scales)} and weights {list(weights)}; "
            "expected scales of at least 1 and one weight for each"
        )
    error = density.float() - counts
    height, width = error.shape[-2:]
    total = error.new_zeros(())
    for scale, weight in zip(scales, weights, strict=True):
        whole = pad(error, (0, -width % scale, 0, -height % scale))
        total = total + weight * avg_pool2d(whole, scale).abs().sum()
    return total / len(density)


def count_error(density: Tensor, counts: Tensor) -> Tensor:
    """Average the absolute error of the whole count over images.

    Args:
        density: ``(B, 1, h, w)`` predicted.
        counts: ``(B, 1, h, w)`` true.
    """
    return (density.float() - counts).sum((1, 2, 3)).abs().mean()


OTReduction = Literal["mean", "sum"]


def classification_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Compute the cross-entropy of the bins, summed over blocks and averaged over images (paper, equation 7).

    Args:
        logits: ``(B, n, h, w)``.
        classes: ``(B, h, w)`` int64, the bin of each block.
    """
    return cross_entropy(logits.float(), classes, reduction="sum") / len(logits)


def block_mae(density: Tensor, counts: Tensor) -> Tensor:
    """Compute absolute errors of the blocks, summed over blocks and averaged over images.

    Args:
        density: ``(B, 1, h, w)`` predicted.
        counts: ``(B, 1, h, w)`` true.
    """
    return (density.float() - counts).abs().sum() / len(density)


def block_mse(density: Tensor, counts: Tensor) -> Tensor:
    """Compute squared errors of the blocks, summed over blocks and averaged over images.

    Args:
        density: ``(B, 1, h, w)`` predicted.
        counts: ``(B, 1, h, w)`` true.
    """
    return (density.float() - counts).square().sum() / len(density)


def dm_loss(
    density: Tensor,
    counts: Tensor,
    points: Sequence[Tensor],
    cell: int,
    *,
    ot_weight: float = 0.1,
    tv_weight: float = 0.01,
    count_weight: float = 1.0,
    ot_reduction: OTReduction = "mean",
    log_domain: bool = False,
    epsilon: float = 10.0,
    iterations: int = 100,
    tolerance: float = 1e-9,
) -> dict[str, Tensor]:
    """Match distributions: optimal transport, total variation and count (Wang et al., DM-Count, 2020).

    With N the number of points of an image, S the sum of its density, y its true and y' its predicted blocks::

        count = |S - N|        tv = N * sum |y' / (S + 1e-8) - y / (N + 1e-8)|        ot: transport_loss

    Args:
        density: ``(B, 1, h, w)`` predicted objects per cell, at least 0.
        counts: ``(B, 1, h, w)`` true counts. Where they sum to less than N (points of one pixel that count once), the
            count term still asks for N, as the reference does.
        points: B tensors ``(N_i, 2)`` of x, y in pixels.
        cell: side of a cell in pixels.
        ot_weight: of the transport term.
        tv_weight: of the total variation.
        count_weight: of the absolute error of the count.
        ot_reduction: over images. ``sum`` is the reference's (losses/dm_loss.py), which makes the weight of the
            transport grow with the batch and the number of crops; the other terms are means.
        log_domain: solve the transport where float32 underflows, see
            :func:`~counting_zoo.models.clip_ebc.loss.transport_potentials`.
        epsilon: entropic regularisation of the transport, in squared pixels.
        iterations: of Sinkhorn, at most.
        tolerance: at which Sinkhorn stops.

    Returns:
        Weighted scalars ``ot``, ``tv``, ``count``; the loss is their sum. Without any point in the batch ``ot`` and
        ``tv`` are 0 and stay in the graph.

    Raises:
        InputError: an unknown reduction, or what
            :func:`~counting_zoo.models.clip_ebc.loss.transport_potentials` refuses.
    """
    if ot_reduction not in ("mean", "sum"):
        raise InputError(f"ot_reduction is {ot_reduction!r}; expected 'mean' or 'sum' (the reference's)")
    density, counts = density.float(), counts.float()
    number = torch.stack([counts.new_full((), len(p)) for p in points])  # without waiting for the device
    total = density.sum((1, 2, 3))
    predicted = density / (total[:, None, None, None] + 1e-8)
    wanted = counts / (number[:, None, None, None] + 1e-8)
    variation = number * (predicted - wanted).abs().sum((1, 2, 3))
    transport = transport_loss(
        density,
        points,
        cell,
        epsilon=epsilon,
        iterations=iterations,
        tolerance=tolerance,
        log_domain=log_domain,
    )
    return {
        "ot": ot_weight * (transport.mean() if ot_reduction == "mean" else transport.sum()),
        "tv": tv_weight * variation.mean(),
        "count": count_weight * (total - number).abs().mean(),
    }
