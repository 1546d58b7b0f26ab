"""One table through which every poison goes: what it changes, how much, what it leaves alone, and its randomness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from robustkit import registry
from robustkit.data.poison.base import Poison
from robustkit.errors import DataError


@dataclass(frozen=True)
class Case:
    """One poison; `dirty`: it changes labels, `marks`: it changes images, `source`: the classes that it takes."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dirty: bool = True
    marks: bool = True
    source: str = "others"

    @property
    def id(self) -> str:
        return "-".join([self.name, *map(str, self.parameters.values())])

    def make(self, **more: object) -> Poison:
        entry = registry.find("poison", self.name)
        clean, problems = registry.check_parameters(entry, {"target": 1, "rate": "20%", **self.parameters, **more})
        assert not problems
        made = registry.create(entry, clean)
        assert isinstance(made, Poison)
        return made

    def candidates(self, labels: Tensor) -> Tensor:
        if self.source == "target":
            return labels == 1
        return labels != 1 if self.source == "others" else labels == int(self.source)


CASES = [
    Case("badnets"),
    Case("badnets", {"size": 1}),
    Case("blended"),
    Case("blended", {"pattern": "stripes", "alpha": 0.5}),
    Case("clean_label", {"steps": 2}, dirty=False, source="target"),
    Case("label_flip", marks=False),
    Case("label_flip", {"source": 3}, marks=False, source="3"),
]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    return images[:300], torch.from_numpy(bunch.target)[:300]


def test_every_built_in_poison_is_in_the_table() -> None:
    assert set(registry.BUILTIN["poison"]) == {case.name for case in CASES}


@every
def test_only_the_chosen_share_is_changed(case: Case, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    before = images.clone(), labels.clone()
    found = case.make().plant(images, labels, 10)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert found.images.dtype == torch.uint8
    assert found.labels.dtype == torch.int64
    candidates = case.candidates(labels)
    assert int(found.mask.sum()) == round(0.2 * int(candidates.sum()))
    assert (found.mask <= candidates).all()
    changed = (found.images != images).flatten(1).any(1)
    assert changed.any() == case.marks
    # A patch may be there by nature.
    already = (case.make().trigger(images) == images).flatten(1).all(1)
    assert torch.equal(changed, found.mask & ~already & case.marks)
    assert torch.equal(found.labels != labels, found.mask & case.dirty)
    assert (found.labels[found.mask] == 1).all()


@every
def test_the_seed_decides_and_a_rate_of_zero_plants_nothing(case: Case, digits: tuple[Tensor, Tensor]) -> None:
    first, again, other = (case.make(seed=seed).plant(*digits, 10) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, other.mask)
    nothing = case.make(rate=0).plant(*digits, 10)
    assert not nothing.mask.any()
    assert torch.equal(nothing.images, digits[0])
    assert torch.equal(nothing.labels, digits[1])


@every
def test_what_is_shown_at_test_time(case: Case, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    poison = case.make()
    victims = poison.victims(labels)
    assert not (victims & (labels == 1)).any()
    assert torch.equal(victims, case.candidates(labels) if case.source != "target" else labels != 1)
    shown = poison.trigger(images)
    assert shown.dtype == torch.uint8
    assert torch.equal(shown, images) != case.marks
    if case.dirty:
        planted = poison.plant(images, labels, 10)
        assert torch.equal(planted.images[planted.mask], shown[planted.mask]), "the trigger is the one of the training"


@every
def test_what_cannot_be_is_an_error(case: Case, digits: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(DataError, match="target is 10; the data have the classes 0 to 9"):
        case.make(target=10).plant(*digits, 10)
    with pytest.raises(DataError, match="raise `rate`"):
        case.make(rate=1e-6).plant(*digits, 10)
