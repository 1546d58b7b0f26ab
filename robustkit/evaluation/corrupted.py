"""Accuracy under common corruptions: what noise, blur, weather and compression do to a model, without an adversary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit import stats
from robustkit.attacks.threat import Threat
from robustkit.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from robustkit.errors import UsageError
from robustkit.evaluation.asked import Model, as_module, checked_examples
from robustkit.evaluation.attacked import Progress, as_images, checked_logits, clean_outcome, device_of, predicted
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.results import Rate
from robustkit.seeding import derive_seed

SEED = 20_190_328
"""Fixed, so that every model sees the same corrupted images."""
CHUNK = 256
"""So many images are corrupted at a time, whatever the batch size: their random numbers come from one generator."""


@dataclass(repr=False)
class Corrupted:
    """Accuracy under each corruption at each severity."""

    clean: Rate
    mean: Rate
    """Mean over all corruptions and severities; its interval is for the choice of images."""
    correct: dict[str, NDArray[np.bool_]]
    """By corruption: whether each example is right at each severity (5, N)."""

    @property
    def by(self) -> dict[str, list[float]]:
        """Accuracies at severities 1 to 5, by corruption."""
        return {name: [float(row.mean()) for row in values] for name, values in self.correct.items()}

    def __repr__(self) -> str:
        width = max(len(name) for name in self.correct)
        lines = [f"accuracy of {self.clean.n} examples, clean {self.clean.value:.2%}, severities 1 to 5"]
        lines += [f"  {name:{width}}  {'  '.join(f'{one:7.2%}' for one in row)}" for name, row in self.by.items()]
        return "\n".join([*lines, f"mean {self.mean.value:.2%}  [{self.mean.low:.2%}, {self.mean.high:.2%}]"])


def corruption_outcome(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    names: Sequence[str],
    *,
    batch_size: int,
    device: torch.device,
    on_progress: Progress | None = None,
) -> dict[str, NDArray[np.bool_]]:
    """Return, by corruption, whether each example is right at each severity (5, N).

    x (N, C, H, W), uint8 or floats in [0, 1]. The corrupted images are drawn on the CPU and are the same for every
    model and batch size. Logits that are not finite are wrong.
    """
    right = {name: torch.zeros(len(SEVERITIES), len(y), dtype=torch.bool, device=device) for name in names}
    jobs = [(first, name, severity) for first in range(0, len(y), CHUNK) for name in names for severity in SEVERITIES]
    with undisturbed(model), torch.no_grad():
        for number, (first, name, severity) in enumerate(jobs, 1):
            images = as_images(x[first : first + CHUNK].to(device))
            generator = torch.Generator().manual_seed(derive_seed(SEED, name, severity, first))
            changed = corrupt(images, name, severity, generator)
            answers = [predicted(checked_logits(model(part), len(part))) for part in changed.split(batch_size)]
            right[name][severity - 1, first : first + CHUNK] = torch.cat(answers) == y[first : first + CHUNK].to(device)
            if on_progress is not None:
                on_progress(number, len(jobs))
    return {name: values.cpu().numpy() for name, values in right.items()}


def mean_accuracy(correct: Mapping[str, NDArray[np.bool_]]) -> Rate:
    """Return the mean over corruptions, severities and examples, with an interval over examples."""
    return stats.mean_of_shares(np.concatenate(list(correct.values())).mean(axis=0))


def corrupted_accuracy(
    model: Model,
    x: Tensor | NDArray[Any],
    y: Tensor | NDArray[Any],
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    batch_size: int = 256,
) -> Corrupted:
    """Return a model's accuracy under common corruptions at five severities (Hendrycks & Dietterich 2019).

    `model`, x and y as in `robustkit.evaluate`, with x (N, C, H, W); every model sees the same corrupted images.

    Raises:
        UsageError: images outside [0, 1] or too small, labels that do not fit, an unknown corruption.
        ModelError: the model returns no logits.
    """
    unknown = [name for name in corruptions if name not in CORRUPTIONS]
    if unknown or not corruptions:
        known = f"known are {', '.join(CORRUPTIONS)}"
        raise UsageError(
            f"unknown corruption {unknown[0]!r}; {known}" if unknown else f"no corruption is named; {known}"
        )
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    images, labels = checked_examples(x, y, Threat("linf", 0.0))
    module = as_module(model)
    device = device_of(module, images.device)
    clean = clean_outcome(module, images, labels, batch_size=batch_size, device=device)
    correct = corruption_outcome(module, images, labels, corruptions, batch_size=batch_size, device=device)
    return Corrupted(clean.rate, mean_accuracy(correct), correct)
