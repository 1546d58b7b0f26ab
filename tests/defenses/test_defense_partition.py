"""A vote over parts of the data: what it counts, what it tolerates, and that a poison reaches one member alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import robustkit
from robustkit.cli.group import run as cli
from robustkit.data.split import Dataset, Split, split_of
from robustkit.defenses.partition import PartitionEnsemble, part_of, parted
from robustkit.errors import RecipeError, RobustkitError, UsageError
from robustkit.models.artefact import load_model, save_model
from robustkit.models.build import build_model
from robustkit.models.vote import Vote, counted, tolerated
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import TrainSpec, Use
from robustkit.results import EpochRow, Filtered
from robustkit.steps.members import mean_rows
from robustkit.train.loop import fit
from robustkit.train.prepare import together

DATA = "{digits: {limit: 300}, poison: {label_flip: {rate: 10%}}}"
RECIPE = """\
name: voted
data: {digits: {limit: 300}, poison: {label_flip: {rate: 10%}}}
model: {small_cnn: {widths: [4, 8]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 2, batch_size: 32}
variants:
  voted: {defenses: [partition_ensemble: {parts: 4}, subsample: {share: 90%}]}
evaluate: {examples: 40, attacks: [], latency: false}
"""


def data_of(split: Split, held: int = 60) -> Dataset:
    rest = torch.arange(held, len(split))
    first, few = split.select(torch.arange(held)), split.select(torch.arange(9))
    return Dataset(split.select(rest), first, few, tuple(map(str, range(10))), "digits", (0.3,), (0.4,))


# The vote


def test_votes_are_counted_and_ties_go_to_the_first_class() -> None:
    logits = torch.tensor([[[0.0, 2, 1], [0, 0, 1]], [[3, 2, 1], [0, 5, 1]], [[0, 2, 9], [4, 5, 1]]])
    assert counted(logits).tolist() == [[1, 1, 1], [0, 2, 1]]
    winner, radius = tolerated(counted(logits))
    assert winner.tolist() == [0, 1]
    assert radius.tolist() == [0, 0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_so_many_changed_members_and_no_more_leave_the_winner(members: list[int]) -> None:
    def winner_of(chosen: tuple[int, ...] | list[int]) -> int:
        return max(range(3), key=lambda one: (chosen.count(one), -one))

    votes = torch.tensor([[members.count(one) for one in range(3)]])
    winner, radius = (int(one) for one in tolerated(votes))
    assert winner == winner_of(members)
    for count in range(len(members) + 1):
        changed = any(
            winner_of([new.get(place, was) for place, was in enumerate(members)]) != winner
            for places in itertools.combinations(range(len(members)), count)
            for values in itertools.product(range(3), repeat=count)
            for new in [dict(zip(places, values, strict=True))]
        )
        # Where even all members together cannot bring about another winner, there would be nothing to say.
        assert changed == (count > radius), (members, count)


class Fixed(nn.Module):
    """Linear in the mean of the image, so that gradients are known."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True) * self.weight


def test_the_output_is_the_vote_and_its_gradient_that_of_the_probabilities() -> None:
    members = [Fixed([1.0, 2.0]), Fixed([3.0, 0.0]), Fixed([5.0, 1.0])]
    vote = Vote(members)
    x = torch.full((2, 1, 2, 2), 0.5, requires_grad=True)
    found = vote(x)
    assert found.round().tolist() == [[2, 1], [2, 1]]
    assert vote.votes(x).tolist() == [[2, 1], [2, 1]]
    (slope,) = torch.autograd.grad(found[:, 0].sum(), x)
    soft = torch.stack([member(x).softmax(1) for member in members]).sum(0)
    torch.testing.assert_close(slope, torch.autograd.grad(soft[:, 0].sum(), x)[0])
    assert Vote(members[:2])(x).argmax(1).tolist() == [0, 0], "a tie"


def test_a_vote_goes_through_a_file(tmp_path: Path) -> None:
    use = Use(name="small_cnn", parameters={"widths": [4]}, label="small_cnn")
    models = [build_model(use, shape=(1, 8, 8), classes=10, mean=[0.1 * n], std=[0.5]) for n in range(3)]
    vote = Vote(models).eval()
    save_model(vote, tmp_path / "vote.safetensors", use, shape=(1, 8, 8), classes=list("0123456789"))
    x = torch.rand(5, 1, 8, 8)
    again = load_model(tmp_path / "vote.safetensors")
    assert isinstance(again, Vote)
    assert torch.equal(again(x), vote(x))


# The parts


def test_parts_are_disjoint_whole_and_drawn_by_content(digits: Split) -> None:
    data = data_of(digits)
    parts = parted(data, 5, 0.2)
    assert sum(len(one.train) + len(one.validation) for one in parts) == len(digits)
    shown = torch.cat([split.images for one in parts for split in (one.train, one.validation)])
    assert len(shown.flatten(1).unique(dim=0)) == len(digits.images.flatten(1).unique(dim=0))
    for number, one in enumerate(parts):
        assert (part_of(one.train.images, 5) == number).all()
        assert len(one.validation) >= 0.15 * len(one.train)
        assert one.mean != data.mean
    sizes = [len(one.train) for one in parts]
    assert max(sizes) < 1.5 * min(sizes)


@settings(deadline=None, max_examples=15)
@given(place=st.integers(0, 299), kind=st.sampled_from(["removed", "relabelled", "added"]), seed=st.integers(0, 99))
def test_a_poison_changes_one_part_alone(digits: Split, place: int, kind: str, seed: int) -> None:
    before = digits.select(torch.arange(300))
    if kind == "removed":
        after = before.select(torch.arange(300) != place)
    elif kind == "relabelled":
        labels = before.labels.clone()
        labels[place] = (labels[place] + 1 + seed % 9) % 10
        after = split_of(before.images, labels)
    else:
        image = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        after = split_of(torch.cat([before.images, image]), torch.cat([before.labels, torch.tensor([seed % 10])]))
    # Which examples were held out, and their order, is no one's secret: it must not matter either.
    order = torch.randperm(len(after), generator=torch.Generator().manual_seed(seed))
    old, new = parted(data_of(before), 3, 0.2), parted(data_of(after.select(order), 50), 3, 0.2)

    def equal(one: Dataset, other: Dataset) -> bool:
        pairs = [(one.train, other.train), (one.validation, other.validation)]
        same = all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)
        return same and (one.mean, one.std) == (other.mean, other.std)

    assert sum(not equal(one, other) for one, other in zip(old, new, strict=True)) == 1


def test_parts_that_are_too_small_are_refused(digits: Split) -> None:
    with pytest.raises(UsageError, match="take fewer parts"):
        parted(data_of(digits), 900, 0.2)


def test_fit_alone_trains_one_model(digits: Split) -> None:
    with pytest.raises(UsageError, match="several models"):
        fit(
            nn.Linear(1, 1), data_of(digits), TrainSpec(), [("x", PartitionEnsemble())],
            threat=robustkit.Threat("linf", 0.1), seed=0, key="k", device=torch.device("cpu"), on_event=lambda *_: None,
        )  # fmt: skip


def test_figures_of_an_epoch_are_means_over_the_members_that_reached_it() -> None:
    rows = [EpochRow(epoch=n, loss=1.0, train_accuracy=0.5, clean=0.5, seconds=1.0) for n in range(2)]
    other = EpochRow(epoch=0, loss=3.0, train_accuracy=0.7, clean=0.9, seconds=2.0)
    first, second = mean_rows([rows, [other]])
    assert (first.loss, first.clean, first.seconds, first.robust) == (2.0, 0.7, 3.0, None)
    assert second.loss == 1.0


def test_what_filters_found_in_the_parts_adds_up() -> None:
    def found(removed: int, hits: int, total: int, left: int) -> dict[str, object]:
        one = Filtered(defense="a", removed=removed, hits=hits, poisoned=total, precision=None, recall=None)
        return {"poisoned": total, "left": left, "filters": [one.model_dump()]}

    whole = together([found(4, 1, 2, 1), found(6, 4, 8, 4)])
    assert whole is not None
    assert (whole["poisoned"], whole["left"]) == (10, 5)
    expected = Filtered(defense="a", removed=10, hits=5, poisoned=10, precision=0.5, recall=0.5)
    assert whole["filters"] == [expected.model_dump()]
    assert together([found(1, 1, 1, 0), None]) is None


# Recipes and runs


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{a: , b: {from: a, train: {}, defenses: [partition_ensemble]}}", "no variant can start from another one"),
        ("{a: {defenses: [partition_ensemble]}, b: {from: a, train: {}}}", "no variant can start from their vote"),
        ("{a: {defenses: [partition_ensemble, jpeg]}}", "jpeg wraps the vote of partition_ensemble"),
        ("{a: {defenses: [partition_ensemble], compress: [global_l1: {sparsity: 50%}]}}", "vote cannot be compressed"),
    ],
)
def test_a_vote_is_made_from_scratch(variants: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"data: digits\nmodel: small_cnn\nvariants: {variants}\n")


def test_a_run_says_how_many_poisons_are_tolerated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "voted.yaml"
    path.write_text(RECIPE)
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 0
    assert "certain whatever poisons do" in capsys.readouterr().out
    folder = tmp_path / "voted"
    (row,) = robustkit.read_results(folder / "results.json").variants
    assert row.tolerance is not None
    assert row.tolerance.members == 4
    assert row.tolerance.poisons == [0, 1, 2]
    shares = [rate.value for rate in row.tolerance.accuracy]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == row.clean.value
    assert row.arrays is not None
    with np.load(folder / row.arrays) as arrays:
        assert [(arrays["tolerated"] >= count).mean() for count in (0, 1, 2)] == pytest.approx(shares)
    assert row.poisoning is not None
    assert [one.defense for one in row.poisoning.filters] == ["subsample"]
    assert row.poisoning.poisoned == row.poisoning.filters[0].poisoned > 10
    assert row.poisoning.left == row.poisoning.poisoned - row.poisoning.filters[0].hits
    assert any("4 members vote" in note for note in row.notes)
    assert sum("subsample" in note for note in row.notes) == 4
    assert "Tolerated poisons" in (folder / "report.md").read_text()
    assert "Tolerated poisons" in (folder / "report.html").read_text()
    models = list(folder.glob("steps/*/model.safetensors"))
    assert isinstance(robustkit.load(models[0]), Vote)
    assert not list(folder.glob("steps/*/*.state"))
    known = (Path(__file__).parents[2] / "docs" / "results-schema.md").read_text()
    for key in ("tolerance", *type(row.tolerance).model_fields):
        assert f"`{key}`" in known or f'"{key}"' in known, key


def test_members_do_not_depend_on_other_parts(tmp_path: Path, digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs on data that differ in one label, one of them stopped in between, all other members are equal.

    So they are where defenses gather something while they train: averages, slow weights, a perturbation, a turn.
    """
    gathering = "ema, lookahead, free: {replay: 2}, subsample"
    images, labels = digits.images[:300].numpy(), digits.labels[:300].numpy()
    changed, place = labels.copy(), 7
    changed[place] = (changed[place] + 1) % 10
    members = []
    calls = iter(range(100))

    def stopped(*given: object, **named: object) -> object:
        if next(calls) == 2:
            raise RobustkitError("stopped")
        return fit(*given, **named)  # type: ignore[arg-type]

    for name, y in (("first", labels), ("second", changed)):
        np.savez(tmp_path / f"{name}.npz", x_train=images, y_train=y, x_test=images[:9], y_test=labels[:9])
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.replace(DATA, f"{{npz: {{path: {name}.npz}}}}").replace("subsample", gathering))
        command = ["run", str(path), "--runs", str(tmp_path), "--name", name, "--quiet"]
        if name == "second":
            with monkeypatch.context() as patched:
                patched.setattr("robustkit.steps.members.fit", stopped)
                assert cli(command) == 1
        assert cli(command) == 0
        vote = robustkit.load(next((tmp_path / name).glob("steps/*/last.safetensors")))
        assert isinstance(vote, Vote)
        members.append([member.state_dict() for member in vote.members])
        (row,) = robustkit.read_results(tmp_path / name / "results.json").variants
        # Attacked in training, and each member kept the best of its own epochs.
        assert any("best (each member's own) " in flag.message for flag in row.flags if flag.id == "best-and-last")
    assert (tmp_path / "second" / "events.jsonl").read_text().count('"event": "resume"') == 2
    differing = [
        number
        for number, (one, other) in enumerate(zip(*members, strict=True))
        if any(not torch.equal(one[key], other[key]) for key in one)
    ]
    assert differing == [int(part_of(digits.images[place : place + 1], 4))]
