"""Checks that a model is in eval mode, and that an image's answer is its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from robustkit.evaluation.checks.batch import flag
from robustkit.results import Flag

BATCH_TOLERANCE = 1e-3
ALONE = 4
MODE_DEPENDENT = (_DropoutNd, _NormBase)


def arrived_training(model: nn.Module) -> list[Flag]:
    """P5, on the model as it came: its user may forget what the evaluation does by itself."""
    names = sorted({type(one).__name__ for one in model.modules() if one.training and isinstance(one, MODE_DEPENDENT)})
    if not names:
        return []
    message = (
        f"the model came in training mode ({', '.join(names)}); it was evaluated in eval mode, so call model.eval() "
        "where you use it, or its accuracy will be another"
    )
    return [flag("P5", "note", message)]


def stays_training(model: nn.Module) -> list[Flag]:
    """P5, on the model after `eval()`."""
    stuck = sorted({type(module).__name__ for module in model.modules() if module.training})
    if not stuck:
        return []
    message = (
        f"{', '.join(stuck)} stays in training mode after model.eval(): dropout or batch statistics are at work while "
        "it is attacked; let train() pass the mode on"
    )
    return [flag("P5", "wrong", message)]


def batch_dependence(model: nn.Module, x: Tensor, logits: Tensor) -> list[Flag]:
    """P7: logits of an image alone against those in a batch."""
    few = min(ALONE, len(x))
    alone = torch.cat([model(x[number : number + 1]).float() for number in range(few)])
    scale = logits[:few].norm(dim=1).clamp_min(1e-6)
    change = float(((alone - logits[:few]).norm(dim=1) / scale).max())
    if change <= BATCH_TOLERANCE:
        return []
    message = (
        f"logits depend on the rest of the batch (relative change {change:.2g}): batch norm in training mode? "
        "Put the model into eval mode"
    )
    return [flag("P7", "wrong", message)]
