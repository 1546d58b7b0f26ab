"""A model with inference wrappers is attacked twice: as deployed, and through its honest view; both count.

A quantized model has no gradient as deployed, so that it is attacked through its view alone; it judges what is found.
Athalye et al. 2018 (arXiv 1802.00420), Tramer et al. 2020 (arXiv 2002.08347).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit.attacks.adaptive import Through
from robustkit.attacks.threat import Attack
from robustkit.evaluation.attacked import as_images
from robustkit.evaluation.outcome import Outcome
from robustkit.models.wrapped import Wrapped, has_view, view_of, without_gradient
from robustkit.results import Flag

Ways = dict[str, NDArray[np.bool_]]
"""What is right as deployed (`naive`) and through the view (`adaptive`); empty for a model without wrappers."""


def adaptive(attack: Attack, model: nn.Module) -> Attack:
    """Return the attack through the view of a wrapped or quantized model; for another model the attack itself."""
    return Through(attack, view_of) if has_view(model) else attack


def checked_view(model: nn.Module, images: Tensor) -> nn.Module:
    """Return what the sanity checks look at: the view of a model that has one if it answers the same, else the model.

    Such a view is the same function with better gradients: what it hides is hidden, what it shows is dealt with. What
    has no gradient at all is looked at through its view in any case; how far the two agree is measured elsewhere.
    images: (N, C, H, W) uint8, or floats in [0, 1].
    """
    if not has_view(model):
        return model
    view = view_of(model)
    if without_gradient(model):
        return view
    with torch.no_grad():
        floats = as_images(images)
        same = torch.equal(view(floats), model(floats))
    return view if same else model


def on_view(flags: Sequence[Flag], *, rounded: bool = False) -> list[Flag]:
    """Return the flags of checks that looked at a view: that its gradients differ from finite differences is meant.

    rounded: the view is of a model without gradients. That is a graph with fixed ranges and statistics, in which an
    image's batch changes no more than which of two neighbouring steps a value is rounded to.
    """
    meant = {"P11": "of the adaptive view, as meant"}
    if rounded:
        meant["P7"] = "rounding to the neighbouring step, with ranges and statistics that are fixed"
    return [
        flag.model_copy(update={"severity": "note", "message": f"{meant[flag.id]}: {flag.message}"})
        if flag.id in meant
        else flag
        for flag in flags
    ]


def attack_both(model: nn.Module, attack: Attack, run: Callable[[Attack, bool], Outcome]) -> tuple[Outcome, Ways]:
    """Return the outcome that counts both ways, and each alone. `run(attack, adaptive)` attacks the model.

    A model whose view is itself is attacked once: the second attack would be the first again.
    """
    if without_gradient(model):
        return run(adaptive(attack, model), False), {}
    naive = run(attack, False)
    if not has_view(model):
        return naive, {}
    if isinstance(model, Wrapped) and model.transparent:
        return naive, {"naive": naive.correct, "adaptive": naive.correct}
    seen = run(adaptive(attack, model), True)
    return combined(naive, seen), {"naive": naive.correct, "adaptive": seen.correct}


def combined(first: Outcome, second: Outcome) -> Outcome:
    """Return the worst case of two outcomes on the same examples: where only the second fooled, it has the say."""
    later = first.correct & ~second.correct
    minimal = first.minimal_distance
    if minimal is not None and second.minimal_distance is not None:
        minimal = np.minimum(minimal, second.minimal_distance)
    return replace(
        first,
        correct=first.correct & second.correct,
        prediction=np.where(later, second.prediction, first.prediction),
        distance=np.where(later, second.distance, first.distance),
        forwards=first.forwards + second.forwards,
        backwards=first.backwards + second.backwards,
        seconds=first.seconds + second.seconds,
        projected=first.projected + second.projected,
        not_finite=first.not_finite + second.not_finite,
        silent=first.silent + second.silent,
        minimal_distance=minimal,
        adversarial=_images(first.adversarial, second.adversarial, later),
    )


def _images(first: Tensor | None, second: Tensor | None, later: NDArray[np.bool_]) -> Tensor | None:
    if first is None or second is None:
        return first
    chosen = torch.from_numpy(later[: len(first)]).view(-1, *[1] * (first.dim() - 1))
    return torch.where(chosen.to(first.device), second, first)
