"""Clean and attacked accuracy of one model, example by example."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.after import After
from robustkit.attacks.counting import CountedModel
from robustkit.attacks.engine import PLAIN, TRIED, Allowed, choose_engine
from robustkit.attacks.projection import distances as distances
from robustkit.attacks.threat import Attack, Threat
from robustkit.errors import AttackError, ModelError, UsageError
from robustkit.evaluation.distances import ABSOLUTE_SLACK, RELATIVE_SLACK
from robustkit.evaluation.outcome import Outcome
from robustkit.evaluation.rounding import rounded
from robustkit.evaluation.seen import NO_CLASS, Checkpoint, Judged, Seen
from robustkit.evaluation.silent import Watched
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.seeding import derive_seed

FASTEST = Allowed()
Progress = Callable[[int, int], None]
"""(examples done, examples to do)"""
AttackProgress = Callable[[int, int, int], None]
"""(examples done, examples to do, those of the done that are still right)"""


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


def device_of(model: nn.Module, otherwise: torch.device) -> torch.device:
    """Return the device of a model's parameters, or `otherwise` for one that has none."""
    return next((one.device for one in model.parameters()), otherwise)


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
    quantize_input: bool = False,
    probes: Tensor | None = None,
    allowed: Allowed = FASTEST,
    on_progress: AttackProgress | None = None,
    checkpoint: Checkpoint | None = None,
    followed: bool = False,
) -> Outcome:
    """Return the outcome of an attack on the examples that the model gets right without it.

    A result counts only if it is finite, within eps (1 + 1e-4) + 1e-6 and in [0, 1], and if the model, asked once more,
    is wrong on it. One of a minimum-norm attack (`minimum_norm`) beyond eps does not count either, but the outcome has
    its distance. Logits that are not finite are no answer: the attack did not fool that example, its clean image and
    prediction are kept, and the outcome counts it.
    Random numbers come from (seed, label): not from what other attacks ran, and for attacks that say
    `seeded_by_example` (robustkit's own) not from batch size and order either; other attacks get a seed for each batch.
    Where the memory does not take a batch, it is halved, down to one example.
    `keep`: how many of the first examples' images the outcome holds. `checkpoint`: where whole batches are kept, so
    that a run that was stopped goes on after them with the same result; with `followed` the last one too, as more is to
    come before the result is stored. `quantize_input`: what the attack found is
    rounded to 8 bits, within the ball, before the model is asked. `probes`: images like x that are tried first, such as
    those that fooled a relative; the attack is run on what they leave. `allowed`: how the search may run the model.

    Raises:
        AttackError: the attack returned something that is no batch of images.
        UsageError: `quantize_input` with clean images that are not of 8 bits.
    """
    started = time.perf_counter()
    threat = threat.to(device)
    todo = torch.from_numpy(np.flatnonzero(clean.correct))
    seen = Seen.start(clean.prediction, as_images(x[:keep].to("cpu")), checkpoint)
    with undisturbed(model), torch.enable_grad():
        counted = CountedModel(model).eval()
        if len(todo):
            counted.engine = choose_engine(counted.model, as_images(x[:TRIED].to(device)), allowed)
        size = batch_size
        while seen.done < len(todo):
            index = todo[seen.done : seen.done + size]
            batch = Batch(
                as_images(x[index.to(x.device)].to(device)),
                y[index.to(y.device)].to(device),
                threat.select(index.to(device)),
                None if probes is None else as_images(probes[index].to(device)),
            )
            drawn = partial(generator_for, attack, seed, label, int(index[0]), device)
            try:
                judged = searched_batch(counted, batch, attack, drawn, label=label, quantize=quantize_input)
            except RuntimeError as error:
                size = halved(len(index), error)
                continue
            seen.add(index, judged)
            seen.pay(counted, time.perf_counter() - started)
            seen.save(checkpoint, last=seen.done == len(todo), followed=followed)
            if on_progress is not None:
                on_progress(seen.done, len(todo), seen.robust(y, todo))
    return seen.outcome(y, keep=keep, minimal=bool(getattr(attack, "minimum_norm", False)))


@dataclass(frozen=True)
class Batch:
    """Examples to attack: x (n, ...), y (n,), their threat, and images (n, ...) to try first, or None."""

    x: Tensor
    y: Tensor
    threat: Threat
    probes: Tensor | None = None

    def rows(self, index: Tensor) -> Batch:
        """Return the examples at `index`."""
        probes = None if self.probes is None else self.probes[index]
        return Batch(self.x[index], self.y[index], self.threat.select(index), probes)


def searched_batch(
    model: CountedModel,
    batch: Batch,
    attack: Attack,
    drawn: Callable[[], torch.Generator],
    *,
    label: str,
    quantize: bool,
) -> Judged:
    """Return what an attack made of a batch; where a search in lower precision was wrong of its success, it goes on in
    the model's own."""
    judged = attacked_batch(model, batch, attack, drawn(), label=label, quantize=quantize)
    if model.engine.exact:
        return judged
    with torch.no_grad():
        claimed = predicted(model(judged.found)) != batch.y
    again = survivors(claimed & (judged.answer == batch.y))
    if not len(again):
        return judged
    with model.running(replace(model.engine, precision=None)):
        exact = attacked_batch(model, batch.rows(again), attack, drawn(), label=label, quantize=quantize)
    return judged.replaced(again, exact)


def attacked_batch(
    model: CountedModel, batch: Batch, attack: Attack, generator: torch.Generator, *, label: str, quantize: bool
) -> Judged:
    """Return what an attack made of one batch, as the model sees it."""
    x, y, threat = batch.x, batch.y, batch.threat
    first = attack if batch.probes is None else After(batch.probes, attack)
    # Attacks of robustkit's own keep the best image that they meet: nothing there to watch.
    watched = None if getattr(first, "seeded_by_example", False) else Watched(model, x, y, threat).eval()
    # A copy: what changes its input in place must still be measured against the clean images.
    found = first(model if watched is None else watched, x.clone(), y.clone(), threat, generator=generator)
    ball = threat.with_eps(torch.inf) if getattr(first, "minimum_norm", False) else threat
    found, length, outside = audited(found, x, ball, label, quantize=quantize)
    answer = asked(model, found)
    silent = torch.zeros_like(outside) if watched is None else (watched.met & (answer == y)).sum()
    return Judged(x, found, answer, length, length <= reach(threat, x), outside, silent)


def asked(counted: CountedModel, images: Tensor) -> Tensor:
    """Return the classes (N,) that a model gives images as its user would ask it: in eval mode, in plain layout."""
    with counted.running(PLAIN), torch.no_grad():
        return predicted(counted.eval()(images))


def halved(size: int, error: RuntimeError) -> int:
    """Return half a batch size where an error says that the memory is full.

    Raises:
        RuntimeError: the error itself, where it says something else or one example is too much.
    """
    full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if not full or size <= 1:
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2


def generator_for(attack: Attack, seed: int, label: str, first: int, device: torch.device) -> torch.Generator:
    """Return the generator for the batch that starts at example `first`."""
    parts = (seed, label) if getattr(attack, "seeded_by_example", False) else (seed, label, first)
    # The meta device has no generators of its own.
    place = "cpu" if device.type == "meta" else device
    return torch.Generator(device=place).manual_seed(derive_seed(*parts))


def audited(
    found: Tensor, x: Tensor, threat: Threat, label: str, *, quantize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (images, distances (N,), number of results put back): what is no valid result becomes the clean image.

    `quantize`: valid results are rounded to 8 bits, and measured so.
    """
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
    valid = finite & ~off_box & (length <= reach(threat, x))
    if quantize:
        boxed = rounded(boxed, x, threat.norm, reach(threat, x))
        length = torch.where(valid, distances(boxed - x, threat.norm), length)
    return torch.where(valid.view(shape), boxed, x), length, (~valid).sum()


def reach(threat: Threat, x: Tensor) -> Tensor:
    """Return how far each result may be from x (N, ...) to count (N,)."""
    return threat.eps_for(x).flatten() * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK
