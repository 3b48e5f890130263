"""Peak response maps: which pixels a peak of a class map comes from (Zhou et al., CVPR 2018).

The gradient of one peak is taken with convolutions that propagate probabilities: a response is shared out among the
inputs of its window in proportion to what they contributed through positive weights. Everything else keeps its
gradient. The network itself is not touched: its convolutions are intercepted while it runs, in this thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

from counting_zoo.errors import InputError

LEAST_NORM = 1e-10
"""Where the positive response is below this nothing is propagated (reference of PRM)."""


class ProbabilisticConv2d(torch.autograd.Function):
    """A convolution whose backward shares its gradient out by contribution.

    With ``v = x - min(x)`` (over the whole tensor) and ``w+ = relu(w)``, the gradient of the input is
    ``v * convT(grad / conv(v, w+), w+)``, and nothing where ``conv(v, w+)`` is below :data:`LEAST_NORM`. The quotient's
    denominator does not depend on the peak and is computed once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> Tensor:
        geometry = (stride, padding, dilation, groups)
        shifted, positive = x - x.min(), weight.relu()
        norm = F.conv2d(shifted, positive, None, *geometry)
        ctx.save_for_backward(shifted, positive, torch.where(norm < LEAST_NORM, 0.0, norm.reciprocal()))
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shifted, positive, inverse = ctx.saved_tensors
        shared = conv2d_input(shifted.shape, positive, grad * inverse, *ctx.geometry)
        return shifted * shared, *[None] * 6


class ProbabilisticBackward(TorchFunctionMode):
    """While active, 2-D convolutions run by this thread get :class:`ProbabilisticConv2d`'s backward.

    Only what runs inside is affected, in this thread, also if it raises; no module is changed. Batch norm must use its
    running statistics and dropout must be off: a response that depends on chance or on other pictures says nothing.

    Raises:
        InputError: on a batch norm or dropout in training mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions."""
        kwargs = kwargs or {}
        if func is F.conv2d:
            self.convolutions += 1
            return _convolution(*args, **kwargs)
        training = False
        if func is F.batch_norm:
            training = _argument(args, kwargs, 5, "training", False)
        elif func in _DROPOUTS:
            training = _argument(args, kwargs, 2, "training", True) and _argument(args, kwargs, 1, "p", 0.5) > 0
        if training:
            raise InputError(
                f"peak responses asked of a network in training mode ({func.__name__} depends on the batch or on "
                "chance); call .eval() on it first"
            )
        return func(*args, **kwargs)


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """The arguments of :func:`torch.nn.functional.conv2d`, named padding written out."""
    odd = (0, 0)
    if padding == "same":  # where an odd number of rows is added torch puts the odd one below, and columns likewise
        reach = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
        padding, odd = [(r + 1) // 2 for r in reach], (reach[0] % 2, reach[1] % 2)
    elif padding == "valid":
        padding = 0
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    return ProbabilisticConv2d.apply(input, weight, bias, *geometry)[..., odd[0] :, odd[1] :]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def peak_response_maps(
    network: Callable[[Tensor], Tensor], image: Tensor, peaks: Tensor, *, together: int = 1
) -> Tensor:
    """Where in the picture each peak of the class maps comes from.

    Parameters and buffers are left as they are and get no gradient; the mode of the caller (``no_grad``,
    ``inference_mode``, autocast) plays no role, everything is computed in the precision of ``image`` and the weights.

    Args:
        network: gives the class maps ``(1, C, h, w)`` of ``image``, in evaluation mode. A compiled or scripted network
            cannot be looked into: hand over the original.
        image: ``(1, 3, H, W)``. The map adds up the gradient over the three channels of what is given here, so to get
            the reference's maps give the normalised picture and let ``network`` not normalise again.
        peaks: ``(P, 3)`` int64 class, row and column of each peak in the class maps.
        together: how many peaks to propagate at once. One is fastest on CPU (ResNet-50, 448 x 448, 5 peaks on one
            core: 3.3 s; 3.6 s by twos, 4.9 s all at once); more may use a GPU better, for as many times the memory.

    Returns:
        ``(P, H, W)`` non-negative maps that sum to 1; all zero where nothing reached the picture.

    Raises:
        InputError: shapes that do not fit, a peak outside the maps, a network in training mode or without convolutions
            that can be seen.

    Example:
        >>> mean = torch.nn.Conv2d(1, 1, 2, stride=2)
        >>> mean.weight.data.fill_(0.25).shape
        torch.Size([1, 1, 2, 2])
        >>> image = torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 5.0]]).view(1, 1, 2, 4)
        >>> peak_response_maps(mean, image, torch.tensor([[0, 0, 1]]))
        tensor([[[0.0000, 0.0000, 0.1250, 0.2500],
                 [0.0000, 0.0000, 0.0000, 0.6250]]])
    """
    if image.ndim != 4 or len(image) != 1:
        raise InputError(f"image has shape {tuple(image.shape)}; expected one picture, (1, 3, H, W)")
    if peaks.ndim != 2 or peaks.shape[1] != 3 or peaks.is_floating_point():
        raise InputError(
            f"peaks is {peaks.dtype} of shape {tuple(peaks.shape)}; expected int64 (P, 3): class, row, column"
        )
    if together < 1:
        raise InputError(f"together is {together}; expected at least one peak per pass")
    height, width = image.shape[-2:]
    if not len(peaks):
        return image.new_zeros(0, height, width)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        leaf = image.detach().clone().requires_grad_()
        with ProbabilisticBackward() as seen:
            class_maps = network(leaf)
        if not seen.convolutions or not class_maps.requires_grad:
            raise InputError(
                f"no convolution between picture and class maps was seen ({seen.convolutions} ran); the network may be "
                "compiled, scripted or run without gradients: hand over the original module"
            )
        where = _checked(peaks, class_maps)
        chunks = [
            _responses(class_maps, leaf, where[start : start + together]) for start in range(0, len(where), together)
        ]
    maps = torch.cat(chunks).sum(1).relu_()  # (P, H, W)
    total = maps.sum((-2, -1), keepdim=True)
    return maps / torch.where(total > 0, total, 1.0)


def _checked(peaks: Tensor, class_maps: Tensor) -> list[list[int]]:
    where: list[list[int]] = peaks.tolist()
    if class_maps.ndim != 4 or len(class_maps) != 1:
        raise InputError(f"the network gave {tuple(class_maps.shape)}; expected class maps (1, C, h, w)")
    limits = class_maps.shape[1:]
    for row, peak in enumerate(where):
        if any(not 0 <= at < limit for at, limit in zip(peak, limits, strict=True)):
            raise InputError(f"peaks[{row}] is {peak}, outside the class maps of {tuple(limits)} (class, row, column)")
    return where


def _responses(class_maps: Tensor, leaf: Tensor, where: list[list[int]]) -> Tensor:
    """``(n, 3, H, W)`` gradients of n peaks."""
    seeds = class_maps.new_zeros(len(where), *class_maps.shape)
    for seed, (kind, row, column) in zip(seeds, where, strict=True):
        seed[0, kind, row, column] = 1
    if len(where) == 1:
        (grad,) = torch.autograd.grad(class_maps, leaf, seeds[0], retain_graph=True)
        return grad
    (grad,) = torch.autograd.grad(class_maps, leaf, seeds, retain_graph=True, is_grads_batched=True)
    return grad[:, 0]


__all__ = ["ProbabilisticBackward", "ProbabilisticConv2d", "peak_response_maps"]
