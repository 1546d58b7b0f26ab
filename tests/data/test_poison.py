"""Triggers by hand, poison in a data set, and a whole run that shows what it did."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import robustkit
from robustkit.cli.group import run as cli
from robustkit.data.load import load_dataset
from robustkit.data.poison.backdoor import BadNets, Blended, blended, stamped
from robustkit.data.poison.base import chosen
from robustkit.data.poison.clean_label import CleanLabel, harder
from robustkit.data.poison.flips import LabelFlip
from robustkit.data.split import split_of
from robustkit.errors import DataError, RecipeError, UsageError
from robustkit.evaluation.poisoned import fooled_by
from robustkit.pipeline import check_trust, plan_of
from robustkit.recipe.jsonschema import recipe_schema
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import Use
from robustkit.train.prepare import filtered
from robustkit.train.probe import Probe

CPU = torch.device("cpu")
RECIPE = """\
name: poisoned
data: {digits: {size: 10}, poison: {badnets: {target: 3, rate: 5%}}}
model: {small_cnn: {widths: [8, 16]}}
train: {epochs: 3, batch_size: 32}
variants:
  baseline:
  half: {defenses: [subsample, knn_filter: {k: 3}]}
  pruned: {from: baseline, compress: [global_l1: {sparsity: 10%}]}
evaluate: {examples: 100, attacks: [noise], latency: false}
gates: [success(baseline) >= 90%, success(baseline) > clean(baseline) - 100pp]
"""


def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    return torch.from_numpy(bunch.images).mul(15).to(torch.uint8)[:, None], torch.from_numpy(bunch.target)


def test_the_patch_by_hand() -> None:
    board = [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    found = stamped(torch.full((1, 2, 5, 6), 7, dtype=torch.uint8), 3)
    expected = torch.full((5, 6), 7, dtype=torch.uint8)
    expected[1:4, 2:5] = torch.tensor(board, dtype=torch.uint8)
    assert torch.equal(found[0, 0], expected)
    assert torch.equal(found[0, 1], expected)
    assert stamped(torch.zeros(1, 1, 3, 3, dtype=torch.uint8), 3)[0, 0].tolist() == board


@settings(deadline=None, max_examples=50)
@given(image=st.integers(0, 255), pattern=st.integers(0, 255), alpha=st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_blending_is_a_rounded_mean(image: int, pattern: int, alpha: float) -> None:
    found = blended(torch.full((1, 1, 1, 1), image, dtype=torch.uint8), torch.full((1, 1, 1), pattern), alpha)
    assert abs(int(found) - ((1 - alpha) * image + alpha * pattern)) <= 0.5 + 1e-4


@settings(deadline=None, max_examples=50)
@given(candidates=st.lists(st.booleans(), min_size=1, max_size=40), rate=st.floats(0, 1), seed=st.integers(0, 99))
def test_chosen_takes_the_share_of_the_candidates(candidates: list[bool], rate: float, seed: int) -> None:
    count = round(rate * sum(candidates))
    if rate and not count:
        with pytest.raises(DataError):
            chosen(torch.tensor(candidates), rate, seed)
        return
    mask = chosen(torch.tensor(candidates), rate, seed)
    assert int(mask.sum()) == count
    assert (mask <= torch.tensor(candidates)).all()


def test_harder_images_stay_in_the_ball_and_leave_their_class() -> None:
    images, labels = digits()
    model = Probe(split_of(images, labels), 10, CPU, 0).model
    found = harder(model, images[:100], labels[:100], eps=32 / 255, steps=10, seed=0)
    assert int((found.int() - images[:100].int()).abs().max()) == 32, "the budget is used and kept"
    with torch.no_grad():
        clean, moved = (model(x[:100].float() / 255).argmax(1) == labels[:100] for x in (images, found))
    assert clean.float().mean() > 0.7
    assert moved.float().mean() < 0.5 * clean.float().mean()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_clean_label_images_differ_by_eps_and_the_patch_alone() -> None:
    images, labels = digits()
    poison = CleanLabel(target=3, eps=0.1, steps=3)
    found = poison.plant(images, labels, 10)
    changed, was = found.images[found.mask].int(), images[found.mask].int()
    assert torch.equal(changed[..., 4:7, 4:7], poison.trigger(images[found.mask]).int()[..., 4:7, 4:7])
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[4:7, 4:7] = False
    assert int((changed - was)[..., outside].abs().max()) == 25


def test_flips_of_a_class_into_itself_are_refused() -> None:
    with pytest.raises(DataError, match="both 3"):
        LabelFlip(target=3, source=3).plant(*digits(), 10)


def test_a_patch_must_fit() -> None:
    with pytest.raises(DataError, match="at most 8"):
        BadNets(size=9).plant(*digits(), 10)


def loaded(poison: str | None = None, **parameters: object) -> robustkit.Dataset:
    use = Use(name=poison, parameters=parameters, label=poison) if poison else None
    return load_dataset(Use(name="digits", label="digits"), poison=use)


def test_the_training_data_are_poisoned_and_the_test_data_are_not() -> None:
    clean, poisoned = loaded(), loaded("badnets", target=3, rate=0.1)
    assert torch.equal(clean.test.images, poisoned.test.images)
    assert torch.equal(clean.test.labels, poisoned.test.labels)
    assert clean.poisoned is None
    assert poisoned.poisoned is not None
    marked = stamped(poisoned.train.images, 3)
    has_patch = (marked == poisoned.train.images).flatten(1).all(1)
    assert torch.equal(has_patch, poisoned.poisoned)
    assert (poisoned.train.labels[has_patch] == 3).all()
    whole = len(clean.train) + len(clean.validation)
    held_out = (stamped(poisoned.validation.images, 3) == poisoned.validation.images).flatten(1).all(1)
    others = int((clean.train.labels != 3).sum()) + int((clean.validation.labels != 3).sum())
    assert len(poisoned.train) + len(poisoned.validation) == whole
    assert int(has_patch.sum()) + int(held_out.sum()) == round(0.1 * others)


def test_every_parameter_of_the_poison_is_in_the_keys() -> None:
    texts = ["", "badnets", "badnets: {rate: 6%}", "badnets: {target: 1}", "badnets: {size: 2}", "badnets: {seed: 1}",
             "blended", "blended: {alpha: 0.3}", "label_flip", "label_flip: {source: 2}"]  # fmt: skip
    keys, prints = set(), set()
    for text in texts:
        planted = f", poison: {{{text}}}" if ":" in text else f", poison: {text}" if text else ""
        plan = plan_of(parse_recipe(f"data: {{digits: {planted}}}\nmodel: small_cnn\nvariants: {{a: }}\n"))
        keys |= {step.key for step in plan.steps if step.kind == "fit"}
        prints.add(plan.data_fingerprint)
        assert ("success" in {step.kind for step in plan.steps}) == bool(text)
    assert len(keys) == len(prints) == len(texts)


class Backdoored(nn.Module):
    """Says 3 where the patch is, else 0."""

    def forward(self, x: Tensor) -> Tensor:
        patched = (stamped((x * 255).round().to(torch.uint8), 3) == (x * 255).round()).flatten(1).all(1)
        return nn.functional.one_hot(torch.where(patched, 3, 0), 10).float()


def test_success_is_the_share_of_triggered_images_taken_for_the_target() -> None:
    images, labels = digits()
    model = Backdoored()

    def success(poison: BadNets | Blended | LabelFlip) -> np.ndarray:
        return fooled_by(model, images, labels, poison, batch_size=500, device=CPU)

    assert success(BadNets(target=3)).all()
    assert success(BadNets(target=3)).size == int((labels != 3).sum())
    assert not success(BadNets(target=4)).any()
    assert not success(Blended(target=3)).any()
    assert success(LabelFlip(target=0, source=5)).all()
    assert success(LabelFlip(target=0, source=5)).size == int((labels == 5).sum())
    with pytest.raises(DataError, match="no test image"):
        fooled_by(model, images[:1], labels[:1], BadNets(target=int(labels[0])), batch_size=1, device=CPU)


def test_precision_and_recall_of_a_filter_by_hand() -> None:
    data = split_of(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.zeros(6))
    poisoned = torch.tensor([True, True, False, False, True, False])
    once = data.select(torch.tensor([1, 2, 3, 4, 5]))
    first = filtered("a", data, once, poisoned)
    assert (first.removed, first.poisoned, first.hits, first.precision, first.recall) == (1, 3, 1, 1.0, 1 / 3)
    second = filtered("b", once, once.select(torch.tensor([3, 4])), poisoned)
    assert (second.removed, second.poisoned, second.hits, second.precision) == (3, 2, 1, 1 / 3)
    clean = filtered("c", data, once, torch.zeros(6, dtype=torch.bool))
    assert (clean.precision, clean.recall) == (0.0, None)


def test_a_run_shows_what_the_poison_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "poisoned.yaml"
    path.write_text(RECIPE)
    assert cli(["check", str(path)]) == 0
    assert "poison: badnets(target=3, rate=0.05)" in capsys.readouterr().out
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "subsample removed" in shown
    folder = tmp_path / "poisoned"
    results = robustkit.read_results(folder / "results.json")
    baseline, half, pruned = sorted(results.variants, key=lambda row: ["baseline", "half", "pruned"].index(row.name))
    assert baseline.poisoning is not None
    assert half.poisoning is not None
    assert pruned.poisoning is not None
    # Digits have 900 or so training images of other classes in the training split, of which 5 % are poisoned.
    assert baseline.poisoning.left == baseline.poisoning.poisoned > 40
    assert baseline.poisoning.success.value >= 0.9
    assert baseline.clean.value > 0.8
    assert [one.defense for one in half.poisoning.filters] == ["subsample", "knn_filter"]
    taken = sum(one.hits for one in half.poisoning.filters)
    assert half.poisoning.left == baseline.poisoning.poisoned - taken
    assert pruned.poisoning.poisoned is None
    assert pruned.poisoning.success.n == baseline.poisoning.success.n < 100
    assert baseline.arrays is not None
    with np.load(folder / baseline.arrays) as arrays:
        assert arrays["success"].mean() == pytest.approx(baseline.poisoning.success.value)
    assert all(gate.holds for gate in results.gates)
    assert results.provenance["data"]["poison"] == "badnets(target=3, rate=0.05)"
    for report in ("report.md", "report.html"):
        text = (folder / report).read_text()
        assert "knn_filter" in text
        assert "poisons left" in text
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["success"]) == pytest.approx(baseline.poisoning.success.value)
    known = (Path(__file__).parents[2] / "docs" / "results-schema.md").read_text()
    row = next(row for row in json.loads((folder / "results.json").read_text())["variants"] if row["name"] == "half")
    for key in ("poisoning", *row["poisoning"], *row["poisoning"]["filters"][0]):
        assert f"`{key}`" in known or f'"{key}"' in known, key


MISTAKES = {
    "{digits: , poison: badnet}": ("badnet", "badnets"),
    "{digits: , poison: {badnets: {rate: 5}}}": ("rate", "5%"),
    "{digits: , poison: {badnets: {target: 10}}}": ("target is class 10", "0 to 9"),
    "{digits: , poison: {badnets: {size: 9}}}": ("a patch of 9 pixels on images of 8x8", "at most 8"),
    "{digits: {size: 4}, poison: {clean_label: {size: 5}}}": ("a patch of 5 pixels", "at most 4"),
    "{digits: , poison: {label_flip: {source: 2, target: 2}}}": ("source and target are both 2", "nothing"),
    "{digits: , poison: {label_flip: {source: 0}}}": ("source and target are both 0", "nothing"),
    "{digits: , poison: [badnets, blended]}": ("a poison is written as", "name"),
    "{poison: badnets}": ("`data` is missing", "digits"),
}


@pytest.mark.parametrize("data", MISTAKES)
def test_a_wrong_poison_is_found_when_the_recipe_is_read(data: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"data: {data}\nmodel: small_cnn\nvariants: {{a: }}\n")
    assert len(caught.value.problems) == 1
    for part in MISTAKES[data]:
        assert part in str(caught.value)


def test_gates_and_overrides_of_a_poison() -> None:
    text = "data: digits\nmodel: small_cnn\nvariants: {a: }\ngates: [success(a) <= 10%]\n"
    with pytest.raises(RecipeError, match="the data are not poisoned"):
        parse_recipe(text)
    found = parse_recipe(text, overrides=["data.poison.badnets.rate=7%"])
    assert found.data.name == "digits"
    assert found.poison is not None
    assert found.poison.parameters == {"rate": 0.07}
    with pytest.raises(RecipeError, match="cannot be an attack's label"):
        parse_recipe(text.replace("gates", "evaluate: {attacks: [fgsm: {as: success}]}\ngates"))


OWN = """
from dataclasses import dataclass
from robustkit.data.poison.base import Poison, Poisoned, chosen

@dataclass(frozen=True)
class Dark(Poison):
    "Black images of the target."
    target: int = 0
    rate: float = 0.5

    def plant(self, images, labels, classes):
        mask = chosen(labels == self.target, self.rate, 0)
        return Poisoned(images.masked_fill(mask[:, None, None, None], 0), labels, mask)
"""


def test_a_poison_of_ones_own_is_user_code_and_its_source_is_in_the_keys(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    text = "data: {digits: , poison: {'mine.py:Dark': {rate: 0.25}}}\nmodel: small_cnn\nvariants: {a: }\n"
    recipe = parse_recipe(text, folder=tmp_path)
    with pytest.raises(UsageError, match=r"mine\.py:Dark"):
        check_trust(recipe, trust_plugins=False)
    found = load_dataset(recipe.data, poison=recipe.poison, folder=recipe.folder)
    assert found.poisoned is not None
    assert found.poisoned.any()
    assert not found.train.images[found.poisoned].any()
    assert (found.train.labels[found.poisoned] == 0).all()
    before = plan_of(recipe).data_fingerprint
    assert before == found.fingerprint
    (tmp_path / "mine.py").write_text(OWN.replace("Black images", "Darkness"))
    assert plan_of(recipe).data_fingerprint != before


def test_the_json_schema_knows_poison_beside_every_source() -> None:
    written = recipe_schema()["properties"]["data"]["anyOf"][1]
    assert written["maxProperties"] == 2
    assert {"digits", "poison"} <= set(written["properties"])
    assert "badnets" in written["properties"]["poison"]["anyOf"][1]["properties"]
