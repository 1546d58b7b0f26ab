"""What a variant is trained on: the training split after every data defense, and how often each example is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustkit.data.split import Dataset, Split
from robustkit.results import Filtered
from robustkit.seeding import derive_seed
from robustkit.train.hooks import DataContext, Defense
from robustkit.train.probe import Probe
from robustkit.train.state import Named

Log = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Prepared:
    """The split to train on, and weights (N,) for drawing from it with replacement, or None."""

    train: Split
    weights: Tensor | None
    poison: dict[str, Any] | None = None
    """Where it is known what is poisoned: how much there was, what each defense removed, what is left."""


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
    filters: list[Filtered] = []
    for label, defense in defenses:
        before, train = train, defense.prepare_data(train, contexts[label])
        if data.poisoned is not None and type(defense).prepare_data is not Defense.prepare_data:
            filters.append(filtered(label.partition("#")[0], before, train, data.poisoned))
    # Only now: weights are one for each example that every defense has left in.
    for label, defense in defenses:
        drawn = defense.sample_weights(train.labels, contexts[label])
        weights = drawn if drawn is not None else weights
    return Prepared(train, weights, _poison(data.poisoned, train, filters))


def filtered(name: str, before: Split, after: Split, poisoned: Tensor) -> Filtered:
    """Return what a defense removed between two splits, against the truth: poisoned (N,) bool by first position."""
    was = poisoned[before.index.cpu()]
    gone = ~torch.isin(before.index, after.index).cpu()
    return _filtered(name, int(gone.sum()), int((gone & was).sum()), int(was.sum()))


def _filtered(name: str, removed: int, hits: int, total: int) -> Filtered:
    precision, recall = hits / removed if removed else None, hits / total if total else None
    return Filtered(defense=name, removed=removed, poisoned=total, hits=hits, precision=precision, recall=recall)


def together(poisons: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return what `Prepared.poison` of several parts of the data says of all of them; None where one says nothing."""
    known = [one for one in poisons if one is not None]
    if len(known) < len(poisons) or not known:
        return None
    filters = [Filtered.model_validate(one) for poison in known for one in poison["filters"]]
    merged = []
    for name in dict.fromkeys(one.defense for one in filters):
        rows = [one for one in filters if one.defense == name]
        counts = (sum(one.removed for one in rows), sum(one.hits for one in rows), sum(one.poisoned for one in rows))
        merged.append(_filtered(name, *counts))
    sums = {name: sum(int(one[name]) for one in known) for name in ("poisoned", "left")}
    return {**sums, "filters": [one.model_dump() for one in merged]}


def _poison(poisoned: Tensor | None, train: Split, filters: Sequence[Filtered]) -> dict[str, Any] | None:
    if poisoned is None:
        return None
    left = int(poisoned[train.index.cpu()].sum())
    return {"poisoned": int(poisoned.sum()), "left": left, "filters": [one.model_dump() for one in filters]}
