"""The fit step of a variant whose data are parted: a model on each part, and their vote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from robustkit.checkpoint import StateFile
from robustkit.data.content import cache_folder
from robustkit.data.split import Dataset
from robustkit.models.vote import Vote
from robustkit.recipe.plan import Step
from robustkit.recipe.spec import VariantSpec
from robustkit.results import EpochRow
from robustkit.train.hooks import Defense, owned_hooks
from robustkit.train.loop import Fitted, fit
from robustkit.train.prepare import together
from robustkit.train.state import Named
from robustkit.workbench import Workbench, threat_of

Build = Callable[[Dataset], nn.Module]
Make = Callable[[], Named]


@dataclass(frozen=True)
class Voting:
    """The votes of the members' best and of their last weights, and what the step's record says."""

    best: Vote
    last: Vote
    record: dict[str, Any]


def owner_of(defenses: Named) -> Defense | None:
    """Return the defense that parts the data; None where there is none."""
    return next((one for _, one in defenses if "partition" in owned_hooks(type(one))), None)


def fit_members(bench: Workbench, variant: VariantSpec, step: Step, data: Dataset, make: Make, build: Build) -> Voting:
    """Train a model on each part, with the variant's other defenses, one after the other.

    Nothing of a training depends on other parts, not even its seeds: what certifies the vote is that an example can
    reach one member alone. `build` makes a new model that normalizes by the statistics of the data it is given; `make`
    makes new defenses, as what they gather in a training (averages, perturbations) must not reach the next member.
    """
    owner = owner_of(make())
    assert owner is not None
    assert variant.train is not None
    parts = owner.partition(data, variant.train.validation) or []
    folder = bench.store.step(step.key)
    folder.mkdir(parents=True, exist_ok=True)
    best, last, fits = [], [], []
    for number, part in enumerate(parts):
        bench.events("data", {"message": f"part {number + 1} of {len(parts)}: {len(part.train)} training images"})
        state = folder / f"part-{number}.state"
        fitted = fit(
            build(part).to(bench.device),
            part,
            variant.train,
            [(label, one) for label, one in make() if "partition" not in owned_hooks(type(one))],
            threat=threat_of(variant.threat),
            seed=step.seed,
            key=f"part {number}",
            device=bench.device,
            on_event=bench.events,
            checkpoint=StateFile(state, bench.warn),
            augment=[bench.create("augmentation", use) for use in variant.train.augment],  # type: ignore[misc]
            create=bench.create,
            choices=cache_folder() / "engines",
        )
        ended = build(part)
        ended.load_state_dict(fitted.last_state)
        best.append(fitted.model)
        last.append(ended)
        fits.append(fitted)
    return Voting(Vote(best), Vote(last), _record(fits, [len(part.train) for part in parts]))


def remove_states(bench: Workbench, step: Step) -> None:
    """Remove what the trainings of the members left to go on from."""
    for path in bench.store.step(step.key).glob("part-*.state"):
        path.unlink()


def _record(fits: Sequence[Fitted], sizes: Sequence[int]) -> dict[str, Any]:
    flags = [(number, flag) for number, one in enumerate(fits, 1) for flag in one.flags]
    notes = [f"part {number}: {note}" for number, one in enumerate(fits, 1) for note in one.notes]
    return {
        "best_epoch": None,
        "epochs": [row.model_dump() for row in mean_rows([one.epochs for one in fits])],
        "flags": [{**flag.model_dump(), "message": f"part {number}: {flag.message}"} for number, flag in flags],
        "notes": [f"{len(sizes)} members vote, trained on {min(sizes)} to {max(sizes)} images each", *notes],
        "train_seconds": round(sum(one.seconds for one in fits), 3),
        "poison": together([one.poison for one in fits]),
    }


def mean_rows(members: Sequence[Sequence[EpochRow]]) -> list[EpochRow]:
    """Return an epoch's figures as means over the members that reached it, seconds as their sum."""
    found = []
    for epoch in range(max((len(rows) for rows in members), default=0)):
        rows = [rows[epoch] for rows in members if epoch < len(rows)]
        held = [row.validation_loss for row in rows if row.validation_loss is not None]
        robust = [row.robust for row in rows if row.robust is not None]
        found.append(
            EpochRow(
                epoch=epoch,
                loss=fmean(row.loss for row in rows),
                train_accuracy=fmean(row.train_accuracy for row in rows),
                validation_loss=fmean(held) if held else None,
                clean=fmean(row.clean for row in rows),
                robust=fmean(robust) if robust else None,
                lr=rows[0].lr,
                seconds=round(sum(row.seconds for row in rows), 3),
            )
        )
    return found
