"""The model and the images that somebody hands over, made fit for attacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.errors import ModelError, UsageError
from robustkit.evaluation.attacked import as_images

Model = nn.Module | Callable[[Tensor], Tensor]
OTHER_TYPES = (torch.float16, torch.bfloat16, torch.float64)


class _Called(nn.Module):
    """Any callable as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Typed(nn.Module):
    """A model of another floating type between float32 images and float32 logits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x.to(self.dtype))
        return logits.float() if isinstance(logits, Tensor) else logits


def as_module(model: Model) -> nn.Module:
    """Return a model as a module that takes float32 images; its type is that of its first floating parameter.

    Raises:
        ModelError: no gradient goes through its parameters.
    """
    if not isinstance(model, nn.Module):
        return _Called(model).eval()
    if any(one.is_inference() for one in model.parameters()):
        raise ModelError(
            "the model was made or loaded under torch.inference_mode(), where no gradient goes through its parameters: "
            "make it outside, or under torch.no_grad()"
        )
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    return _Typed(model, dtype) if dtype in OTHER_TYPES else model


def checked_examples(x: Tensor | NDArray[Any], y: Tensor | NDArray[Any], threat: Threat) -> tuple[Tensor, Tensor]:
    """Return images (N, ...), uint8 or float32 in [0, 1], and labels (N,) as int64.

    Raises:
        UsageError: what is given is not that, or does not fit the threat.
    """
    # Outside inference mode its tensors take no part in a backward; a clone does.
    images, labels = (one.clone() if one.is_inference() else one for one in map(torch.as_tensor, (x, y)))
    if images.dim() < 2:
        raise UsageError(f"images are {tuple(images.shape)}; one row an example (N, ...) is needed")
    if images.dtype != torch.uint8:
        images = as_images(images)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() != 1:
        raise UsageError(f"labels are {labels.dtype} {tuple(labels.shape)}; class numbers (N,) are needed")
    if len(labels) != len(images):
        raise UsageError(f"{len(images)} images but {len(labels)} labels")
    if not len(labels):
        raise UsageError("no images to evaluate on")
    if not isinstance(threat, Threat):
        raise UsageError(f"threat is {threat!r}; give robustkit.Threat('linf', 8 / 255)")
    if isinstance(threat.eps, Tensor) and threat.eps.dim() and len(threat.eps) != len(labels):
        raise UsageError(f"{len(labels)} images but {len(threat.eps)} eps")
    return images, labels.to(torch.int64)
