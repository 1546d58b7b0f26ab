"""What a variant is trained on: the training split after every data defense, and how often each example is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustkit.data.split import Dataset, Split
from robustkit.seeding import derive_seed
from robustkit.train.hooks import DataContext
from robustkit.train.probe import Probe
from robustkit.train.state import Named

Log = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Prepared:
    """The split to train on, and weights (N,) for drawing from it with replacement, or None."""

    train: Split
    weights: Tensor | None


def prepare_data(data: Dataset, defenses: Named, *, seed: int, key: str, device: torch.device, log: Log) -> Prepared:
    """Return what the data defenses leave of the training split, and the weights that one of them may give."""
    probe = Probe(data.train, len(data.classes), device, derive_seed(seed, key, "probe"))
    contexts = {
        label: DataContext(
            generator=torch.Generator().manual_seed(derive_seed(seed, key, label, "data")),
            device=device,
            log=log,
            features=probe,
            test=data.test,
        )
        for label, _ in defenses
    }
    train, weights = data.train, None
    for label, defense in defenses:
        train = defense.prepare_data(train, contexts[label])
    # Only now: weights are one for each example that every defense has left in.
    for label, defense in defenses:
        drawn = defense.sample_weights(train.labels, contexts[label])
        weights = drawn if drawn is not None else weights
    return Prepared(train, weights)
