"""Clean and attacked accuracy of one model, example by example."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks.counting import CountedModel
from robustkit.attacks.threat import Attack, Threat
from robustkit.errors import AttackError, ModelError, UsageError
from robustkit.evaluation.outcome import Outcome
from robustkit.evaluation.silent import Watched
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.seeding import derive_seed

RELATIVE_SLACK = 1e-4
ABSOLUTE_SLACK = 1e-6
NO_CLASS = -1
"""The prediction from logits that are not finite."""
Progress = Callable[[int, int], None]


def as_images(x: Tensor) -> Tensor:
    """Return images as float32 in [0, 1]: uint8 is scaled, floats are checked.

    Raises:
        UsageError: values outside [0, 1]; normalization belongs into the model.
    """
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(255)
    if not x.is_floating_point():
        raise UsageError(f"images are {x.dtype}; uint8, or floats in [0, 1], are needed")
    if x.numel():
        low, high = (float(value) for value in torch.aminmax(x.detach()))
        if not (low >= -ABSOLUTE_SLACK and high <= 1 + ABSOLUTE_SLACK):
            raise UsageError(
                f"images lie in [{low:.3g}, {high:.3g}], not in [0, 1]; give raw images and put the normalization "
                "into the model, e.g. robustkit.models.normalized.Normalized(model, mean, std)"
            )
    return x.detach().to(torch.float32).clamp(0, 1)


def distances(delta: Tensor, norm: str) -> Tensor:
    """Return the norm of each example's change (N,)."""
    flat = delta.flatten(1)
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    norms: Tensor = torch.linalg.vector_norm(flat, ord=order, dim=1)
    return norms


def clean_outcome(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int, device: torch.device) -> Outcome:
    """Return the outcome without an attack. Logits that are not finite are wrong, whatever the label.

    Raises:
        ModelError: the model does not return logits (N, classes) with at least two classes.
        UsageError: a label is no class of the model.
    """
    started = time.perf_counter()
    predictions = []
    classes = 2
    with undisturbed(model), torch.no_grad():
        for first in range(0, len(y), batch_size):
            images = as_images(x[first : first + batch_size].to(device))
            logits = checked_logits(model(images), len(images))
            classes = logits.shape[1]
            predictions.append(predicted(logits))
    prediction = torch.cat(predictions).cpu() if predictions else torch.zeros(0, dtype=torch.int64)
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < classes):
        raise UsageError(
            f"labels go from {int(y.min())} to {int(y.max())}, the model has {classes} classes: 0 to {classes - 1}"
        )
    return Outcome(
        correct=(prediction == y.cpu()).numpy(),
        prediction=prediction.numpy(),
        distance=np.zeros(len(y), dtype=np.float32),
        forwards=len(y),
        backwards=0,
        seconds=time.perf_counter() - started,
        not_finite=int((prediction == NO_CLASS).sum()),
    )


def predicted(logits: Tensor) -> Tensor:
    """Return the likeliest class (N,) of logits (N, classes), NO_CLASS where a logit is not finite."""
    # The argmax of NaN is a class like any other: it would be right for that class.
    return logits.argmax(1).where(torch.isfinite(logits).all(1), NO_CLASS)


def checked_logits(logits: object, count: int) -> Tensor:
    """Return what a model returned for `count` images if it is logits (count, classes).

    Raises:
        ModelError: it is not.
    """
    if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == count and logits.shape[1] >= 2:
        return logits
    got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise ModelError(
        f"the model returned {got} for {count} images; logits ({count}, classes) with two classes or more are needed "
        "(for one logit z, return [-z, z] / 2)"
    )


def attack_outcome(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    *,
    clean: Outcome,
    seed: int,
    label: str,
    batch_size: int,
    device: torch.device,
    keep: int = 0,
    on_progress: Progress | None = None,
) -> Outcome:
    """Return the outcome of an attack on the examples that the model gets right without it.

    A result counts only if it is finite, within eps (1 + 1e-4) + 1e-6 and in [0, 1], and if the model, asked once more,
    is wrong on it. Logits that are not finite are no answer: the attack did not fool that example, its clean image and
    prediction are kept, and the outcome counts it.
    Random numbers come from (seed, label): not from what other attacks ran, and for attacks that say
    `seeded_by_example` (robustkit's own) not from batch size and order either; other attacks get a seed for each batch.
    `keep`: how many of the first examples' images the outcome holds.

    Raises:
        AttackError: the attack returned something that is no batch of images.
    """
    started = time.perf_counter()
    threat = threat.to(device)
    todo = torch.from_numpy(np.flatnonzero(clean.correct))
    seen = _Seen(
        prediction=torch.from_numpy(clean.prediction.copy()),
        distance=torch.zeros(len(y)),
        projected=torch.zeros((), dtype=torch.int64, device=device),
        not_finite=torch.zeros((), dtype=torch.int64, device=device),
        silent=torch.zeros((), dtype=torch.int64, device=device),
        images=as_images(x[:keep].to("cpu")).clone(),
    )
    with undisturbed(model), torch.enable_grad():
        counted = CountedModel(model)
        # Attacks of robustkit's own keep the best image that they meet.
        watched = None if getattr(attack, "seeded_by_example", False) else Watched(counted)
        shown = (counted if watched is None else watched).eval()
        for first in range(0, len(todo), batch_size):
            index = todo[first : first + batch_size]
            images = as_images(x[index.to(x.device)].to(device))
            labels = y[index.to(y.device)].to(device)
            generator = generator_for(attack, seed, label, int(index[0]), device)
            budget = threat.select(index.to(device))
            # A copy: what changes its input in place must still be measured against the clean images.
            if watched is not None:
                watched.watch(images, labels, budget)
            found = attack(shown, images.clone(), labels.clone(), budget, generator=generator)
            found, length, outside = audited(found, images, budget, label)
            shown.eval()
            with torch.no_grad():
                answer = predicted(counted(found))
            seen.add(index, images, found, answer, length, outside)
            if watched is not None:
                seen.silent += (watched.met & (answer == labels)).sum()
            if on_progress is not None:
                on_progress(min(first + batch_size, len(todo)), len(todo))
    return Outcome(
        correct=(seen.prediction == y.cpu()).numpy(),
        prediction=seen.prediction.numpy(),
        distance=seen.distance.numpy(),
        forwards=counted.forwards,
        backwards=counted.backwards,
        seconds=time.perf_counter() - started,
        projected=int(seen.projected),
        not_finite=int(seen.not_finite),
        silent=int(seen.silent),
        adversarial=seen.images if keep else None,
    )


@dataclass
class _Seen:
    """What an attack did so far: one entry a test example, and the first examples' images."""

    prediction: Tensor
    distance: Tensor
    projected: Tensor
    not_finite: Tensor
    silent: Tensor
    images: Tensor

    def add(
        self, index: Tensor, images: Tensor, found: Tensor, answer: Tensor, length: Tensor, outside: Tensor
    ) -> None:
        """Take in the batch of the examples at `index`: clean images, what was found, and the model's answer to it."""
        self.projected += outside
        answered = answer != NO_CLASS
        self.not_finite += (~answered).sum()
        self.prediction[index] = torch.where(answered.cpu(), answer.cpu(), self.prediction[index])
        self.distance[index] = length.cpu()
        shown = index < len(self.images)
        kept = torch.where(answered.view(-1, *[1] * (found.dim() - 1)), found, images)
        self.images[index[shown]] = kept[shown.to(found.device)].cpu()


def generator_for(attack: Attack, seed: int, label: str, first: int, device: torch.device) -> torch.Generator:
    """Return the generator for the batch that starts at example `first`."""
    parts = (seed, label) if getattr(attack, "seeded_by_example", False) else (seed, label, first)
    # The meta device has no generators of its own.
    place = "cpu" if device.type == "meta" else device
    return torch.Generator(device=place).manual_seed(derive_seed(*parts))


def audited(found: Tensor, x: Tensor, threat: Threat, label: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (images, distances (N,), number of results put back): what is no valid result becomes the clean image."""
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise AttackError(f"attack {label} returned {got} for images {tuple(x.shape)}")
    found = found.detach().to(x.device, torch.float32)
    shape = (-1, *[1] * (x.dim() - 1))
    finite = torch.isfinite(found.flatten(1)).all(1)
    found = torch.where(finite.view(shape), found, x)
    boxed = found.clamp(0, 1)
    off_box = (found - boxed).abs().flatten(1).amax(1) > ABSOLUTE_SLACK
    length = distances(boxed - x, threat.norm)
    eps = threat.eps_for(x).flatten()
    valid = finite & ~off_box & (length <= eps * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK)
    return torch.where(valid.view(shape), boxed, x), length, (~valid).sum()
