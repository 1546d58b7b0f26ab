"""Interval bound propagation: a lower bound of every margin on a whole ball (Gowal et al. 2018, arXiv 1810.12715)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.certificates.boxes import Box
from robustkit.certificates.certificate import Certified
from robustkit.certificates.propagate import Features, propagate, trace
from robustkit.errors import InternalError, ModelError
from robustkit.evaluation.attacked import checked_logits, predicted
from robustkit.evaluation.distances import ABSOLUTE_SLACK, RELATIVE_SLACK

ROUNDING = 1e-5
"""Share of the logits' size that a margin must be above 0 by: the bounds hold for real numbers, the model computes in
float32."""
ROUNDING_ON_ACCELERATORS = 2e-3
"""Their convolutions may round what they multiply to ten bits (TF32)."""
PASSES = 3
"""Forwards an example: the centre and the radius of its box, and the model itself."""


def ball(x: Tensor, threat: Threat) -> Box:
    """Return a box that holds the threat's ball around x (N, ...) in [0, 1], in float64 where the device has it.

    Every l2 or l1 ball lies in the linf ball of the same eps. The box is as much larger as an attack's result may be.
    """
    exact = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    eps = threat.eps_for(exact) * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK
    return Box((exact - eps).clamp(0, 1), (exact + eps).clamp(0, 1))


def margins(found: Box | Features, y: Tensor) -> Tensor:
    """Return lower bounds of z_y - z_j for each class j (N, classes), infinite for j = y.

    With the last linear layer's input, each difference of two logits is bounded as one linear map (section 3), which
    is tighter than the difference of the logits' bounds.
    """
    lower = _merged(found.box, found.head, y) if isinstance(found, Features) else _apart(found, y)
    return lower.scatter(1, y[:, None], torch.inf)


def _apart(logits: Box, y: Tensor) -> Tensor:
    return logits.lower.gather(1, y[:, None]) - logits.upper


def _merged(box: Box, head: nn.Linear, y: Tensor) -> Tensor:
    weight = head.weight.to(box.lower.dtype)
    bias = None if head.bias is None else head.bias.to(box.lower.dtype)
    middle, radius = nn.functional.linear(box.centre, weight, bias), box.radius
    chosen = weight[y]
    spread = torch.stack([((chosen - row).abs() * radius).sum(1) for row in weight], dim=1)
    return middle.gather(1, y[:, None]) - middle - spread


def interval_margins(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Return lower bounds of z_y - z_j (N, classes) on the threat's ball in [0, 1]; infinite for j = y.

    x (N, ...) in [0, 1]; `model` in eval mode, of float32 or float64. NaN where a bound is not a number.

    Raises:
        ModelError: the model cannot be traced, or has a layer without bounds; the message names it.
    """
    wrong = next((one.dtype for one in model.parameters() if one.dtype not in (torch.float32, torch.float64)), None)
    if wrong is not None:
        raise ModelError(f"interval: the model has weights of {wrong}, whose rounding the bounds do not cover")
    with torch.no_grad():
        found = propagate(trace(model), ball(x, threat))
        shape = found.lower.shape if isinstance(found, Box) else found.box.lower.shape
        if len(shape) != 2 or shape[0] != len(x):
            raise ModelError(f"interval: the model's output has bounds {tuple(shape)}; (N, classes) is needed")
        return margins(found, y)


@dataclass(frozen=True)
class Interval:
    """Interval bounds through every layer (IBP, Gowal et al. 2018): for linf; valid but loose for l2 and l1."""

    smoothed: ClassVar[bool] = False

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator
    ) -> Certified:
        """Return which examples keep their label on the whole ball."""
        with torch.no_grad():
            logits = checked_logits(model(x), len(x))
            bounds = interval_margins(model, x, y, threat)
            size = logits.abs().amax(1, keepdim=True).to(bounds.dtype) + 1
            allowance = size * (ROUNDING if x.device.type == "cpu" else ROUNDING_ON_ACCELERATORS)
            _check_inside(bounds, logits, y, allowance)
            certified = (bounds > allowance).all(1)
        radius = torch.where(certified, threat.eps_for(x).flatten(), 0.0)
        return Certified(certified, predicted(logits), radius, PASSES * len(x))


def _check_inside(bounds: Tensor, logits: Tensor, y: Tensor, allowance: Tensor) -> None:
    """Raise an InternalError where the margins at the images themselves are below their lower bounds.

    A trace that is not what the model does (code that depends on the values of its input) is found by this.
    """
    real = logits.to(bounds.dtype)
    real = (real.gather(1, y[:, None]) - real).scatter(1, y[:, None], torch.inf)
    if bool((real < bounds - allowance).any()):
        raise InternalError(
            "interval: the model's own logits lie outside of their bounds: it does something else than what torch.fx "
            "traced of it; use randomized_smoothing, and please report the model"
        )
