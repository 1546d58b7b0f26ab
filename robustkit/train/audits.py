"""A close look at what a defense's perturb returns and leaves behind; it waits for the device, so it looks rarely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.errors import TrainingError
from robustkit.train.hooks import Batch, Defense, Step

SLACK = 1e-5
"""Room for rounding, in pixel units."""


def audited_perturb(defense: Defense, batch: Batch, step: Step) -> Tensor | None:
    """Return what the defense's perturb returns, once it is known to be right.

    Raises:
        TrainingError: the images are not finite, outside [0, 1], of another shape or beyond the defense's budget, or
            perturb changed the batch, the model's mode or its parameters; it names the plugin.
    """
    before = _Before.of(step.model, batch.x)
    found = defense.perturb(batch, step)
    wrong = before.wrong(step.model, batch.x)
    if found is not None and wrong is None:
        wrong = wrong_images(found.detach(), batch.x, step, defense.budget(step.threat))
    if wrong is not None:
        raise TrainingError(f"{step.label or type(defense).__name__}: perturb {wrong}")
    return found


def wrong_images(x_adv: Tensor, x: Tensor, step: Step, budget: float) -> str | None:
    """Return what is wrong with perturbed images (N, C, H, W) of x; None where nothing is. `budget` in the norm."""
    if x_adv.shape != x.shape:
        return f"returned images of shape {tuple(x_adv.shape)} for {tuple(x.shape)}"
    if not bool(torch.isfinite(x_adv).all()):
        return "returned images that are not finite"
    low, high = (float(value) for value in torch.aminmax(x_adv))
    if low < -SLACK or high > 1 + SLACK:
        return f"returned images outside [0, 1]: from {low:.4g} to {high:.4g}; clamp them"
    norm = step.threat.norm
    delta = (x_adv - x).float().flatten(1)
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}[norm]
    size = float(torch.linalg.vector_norm(delta, ord=order, dim=1).max())
    # A sum over the image rounds more than a single value does.
    room = SLACK * (1 if norm == "linf" else max(1.0, budget) * 10)
    if size > budget + room:
        return (
            f"went {size:.4g} far under {norm}, and its budget is {budget:.4g}; project the images, or say in "
            "`budget(threat)` how far it may go"
        )
    return None


@dataclass(frozen=True)
class _Before:
    """The images, the modes and the parameters before a perturb."""

    x: Tensor
    modes: list[bool]
    parameters: list[tuple[bool, Tensor | None, int, int]]

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> _Before:
        return cls(x.clone(), [module.training for module in model.modules()], _parameters(model))

    def wrong(self, model: nn.Module, x: Tensor) -> str | None:
        if not torch.equal(x, self.x):
            return "changed the clean images in place; return new ones"
        changed = [
            name or "the model"
            for (name, module), mode in zip(model.named_modules(), self.modes, strict=True)
            if module.training != mode
        ]
        if changed:
            return f"left {changed[0]} in another mode than it was in; use attack_mode"
        for (name, _), old, new in zip(model.named_parameters(), self.parameters, _parameters(model), strict=True):
            if new[0] != old[0]:
                return f"left requires_grad of {name} as {new[0]}; use attack_mode"
            if new[1] is not old[1] or new[2] != old[2]:
                return f"changed the gradient of {name}; take gradients with torch.autograd.grad"
            if new[3] != old[3]:
                return f"changed the parameter {name}"
        return None


def _parameters(model: nn.Module) -> list[tuple[bool, Tensor | None, int, int]]:
    return [
        (one.requires_grad, one.grad, -1 if one.grad is None else one.grad._version, one._version)
        for one in model.parameters()
    ]
