"""The ensemble of variants: what it answers, its view, its file, its costs, its keys, and mistakes in recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import robustkit
from robustkit.attacks.adaptive import Bpda
from robustkit.defenses.inference import BitDepth
from robustkit.defenses.joint import Ensemble, Joint
from robustkit.errors import ModelError, RecipeError, UsageError
from robustkit.evaluation.both import attack_both
from robustkit.models.artefact import load_model, save_model
from robustkit.models.build import build_model
from robustkit.models.vote import Vote
from robustkit.models.wrapped import Wrapped
from robustkit.recipe.plan import make_plan
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import Use

HEAD = """\
name: joint
data: {digits: {limit: 300}}
model: {small_cnn: {widths: [4, 8]}}
threat: {norm: linf, eps: 0.1}
train: {epochs: 1, batch_size: 64, optimizer: {sgd: {lr: 0.1, momentum: 0.9}}}
evaluate: {examples: 40, attacks: [pgd: {steps: 3}], latency: false}
variants:
"""
VARIANTS = """\
  joint: {from: baseline, defenses: [ensemble: {members: [squeezed, wide]}]}
  baseline:
  squeezed: {from: baseline, train: {}, defenses: [bit_depth: {bits: 1}]}
  wide: {model: {small_cnn: {widths: [5, 6]}}}
  pruned: {from: joint, compress: [global_l1: {sparsity: 50%}]}
"""

SHAPE, CLASSES = (1, 8, 8), ("a", "b", "c")


def network(seed: int, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes)).eval()


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def ensemble(*members: nn.Module) -> Ensemble:
    made = Ensemble(["any"] * len(members))
    made.take_members(members)
    return made


def test_it_answers_with_the_mean_of_probabilities() -> None:
    one, two = network(1), network(2)
    wrapped = Wrapped(one, [ensemble(two)]).eval()
    expected = (one(images()).softmax(1) + two(images()).softmax(1)) / 2
    torch.testing.assert_close(wrapped(images()).softmax(1), expected)
    torch.testing.assert_close(wrapped(images()).exp(), expected)


def test_an_open_ensemble_is_attacked_once_and_one_with_a_wrapped_member_twice() -> None:
    calls: list[bool] = []

    def run(attack: object, adaptive: bool) -> robustkit.evaluation.outcome.Outcome:  # type: ignore[name-defined]
        calls.append(adaptive)
        return robustkit.evaluate(network(1), images(), [0] * 4, threat=threat, attacks=["noise"]).outcomes["noise"]

    threat = robustkit.Threat("linf", 0.1)
    opened = Wrapped(network(1), [ensemble(network(2))])
    assert opened.transparent
    _, ways = attack_both(opened, lambda *_, **__: images(), run)
    assert (calls, ways["naive"].tolist()) == ([False], ways["adaptive"].tolist())
    closed = Wrapped(network(1), [ensemble(Wrapped(network(2), [BitDepth(1)]))])
    attack_both(closed, lambda *_, **__: images(), run)
    assert calls == [False, False, True]


def test_the_view_looks_behind_the_wrappers_of_members_and_keeps_those_below_it() -> None:
    wrapped = Wrapped(network(1), [BitDepth(2), ensemble(Wrapped(network(2), [BitDepth(1)]))]).eval()
    view, x = wrapped.view(), images().requires_grad_()
    assert isinstance(view, Joint)
    assert all(isinstance(one, Bpda) for one in view.members)
    assert torch.equal(view(x), wrapped(x))
    (gradient,) = torch.autograd.grad(view(x)[:, 0].sum(), x)
    assert (gradient.abs().flatten(1).amax(1) > 0).all()


def test_models_that_know_other_classes_and_members_that_are_missing() -> None:
    with pytest.raises(ModelError, match="know 3, 5 classes"):
        Wrapped(network(1), [ensemble(network(2, classes=5))])(images())
    with pytest.raises(UsageError, match="2 members are named, 1 models given"):
        Ensemble(["a", "b"]).take_members([network(1)])
    with pytest.raises(UsageError, match="take_members"):
        Ensemble(["a"]).wrap(network(1))


@pytest.mark.slow
def test_a_run_stores_attacks_counts_and_reports_an_ensemble(tmp_path: Path) -> None:
    results = robustkit.run(HEAD + VARIANTS, runs=tmp_path)
    assert not results.failures
    rows = {row.name: row for row in results.variants}
    models = {name: robustkit.load(tmp_path / "joint" / str(row.model)) for name, row in rows.items()}
    answers = [models[name](images()).softmax(1) for name in ("baseline", "squeezed", "wide")]
    torch.testing.assert_close(models["joint"](images()).exp(), torch.stack(answers).mean(0))
    assert torch.equal(models["pruned"].deployed.members[1](images()), models["squeezed"](images()))
    for name in ("parameters", "macs"):
        parts = [getattr(rows[one], name) for one in ("baseline", "squeezed", "wide")]
        assert getattr(rows["joint"], name) == sum(parts)
    assert rows["joint"].members == ["squeezed", "wide"]
    assert rows["joint"].adaptive is not None
    assert any("survives" in note for note in rows["joint"].notes)
    assert "ensemble(members=[squeezed, wide])" in rows["joint"].method


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file in which a small_cnn answers with a narrower one behind bit_depth."""
    uses = [Use(name="small_cnn", parameters={"widths": widths}, label="small_cnn") for widths in ([4, 4], [3])]
    bits = Use(name="bit_depth", parameters={"bits": 1}, label="bit_depth")
    joint = Use(name="ensemble", parameters={"members": ["other"]}, label="ensemble")
    one, two = (build_model(use, shape=SHAPE, classes=3, mean=[0.5], std=[0.5]) for use in uses)
    save_model(two, tmp_path / "two.safetensors", uses[1], shape=SHAPE, classes=CLASSES, wrappers=[bits])
    path, members = tmp_path / "joint.safetensors", {"ensemble": [tmp_path / "two.safetensors"]}
    save_model(one, path, uses[0], shape=SHAPE, classes=CLASSES, wrappers=[joint], members=members)
    return path


def test_an_ensemble_is_one_file(stored: Path) -> None:
    joint = robustkit.load(stored)
    plain, other = load_model(stored, wrapped=False), robustkit.load(stored.with_name("two.safetensors"))
    stored.with_name("two.safetensors").unlink()
    assert torch.equal(joint(images()), Joint([plain, other])(images()))
    assert isinstance(joint.deployed.members[1], Wrapped)


def test_a_vote_may_be_a_member(stored: Path) -> None:
    use = Use(name="small_cnn", parameters={"widths": [3]}, label="small_cnn")
    vote = Vote([build_model(use, shape=SHAPE, classes=3, mean=[0.5], std=[0.5]).eval() for _ in range(2)]).eval()
    other, path = stored.with_name("vote.safetensors"), stored.with_name("both.safetensors")
    save_model(vote, other, use, shape=SHAPE, classes=CLASSES)
    plain = build_model(use, shape=SHAPE, classes=3, mean=[0.5], std=[0.5]).eval()
    joint = Use(name="ensemble", parameters={"members": ["vote"]}, label="it")
    save_model(plain, path, use, shape=SHAPE, classes=CLASSES, wrappers=[joint], members={"it": [other]})
    assert torch.equal(robustkit.load(path)(images()), Joint([plain, vote])(images()))


def test_files_whose_members_do_not_fit_are_refused(stored: Path) -> None:
    tensors = load_file(stored)
    with safe_open(str(stored), framework="pt") as file:
        described = json.loads(file.metadata()["robustkit"])

    def refused(words: str, **more: Tensor) -> None:
        save_file({**tensors, **more}, stored, metadata={"robustkit": json.dumps(described)})
        with pytest.raises(ModelError, match=words):
            robustkit.load(stored)

    refused("unknown .'wrappers.0.members.9.mean'", **{"wrappers.0.members.9.mean": torch.zeros(1)})
    member = described["wrappers"][0]["members"][0]
    described["wrappers"][0]["members"] = [{**member, "classes": ["a", "b"]}]
    refused("member 1 takes images .* of 2 classes, the model .* of 3")
    described["wrappers"][0]["members"] = [{**member, "parameters": {"widths": [5]}}]
    refused("has shape")
    described["wrappers"][0]["members"] = []
    refused("unknown")


def fit_keys(variants: str) -> dict[str, str]:
    found = make_plan(parse_recipe(HEAD + variants), "data", lambda kind, use: "v1")
    return {label: key for (label, _), key in found.fit_keys.items()}


def test_members_come_first_and_their_models_not_their_names_are_in_the_key() -> None:
    recipe = parse_recipe(HEAD + VARIANTS)
    assert [one.label for one in recipe.variants] == ["baseline", "squeezed", "wide", "joint", "pruned"]
    before = fit_keys(VARIANTS)
    renamed = fit_keys(VARIANTS.replace("wide", "broad"))
    assert before["joint"] == renamed["joint"]
    other = fit_keys(VARIANTS.replace("widths: [5, 6]", "widths: [5, 7]"))
    assert before["joint"] != other["joint"]
    assert before["squeezed"] == other["squeezed"]


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ("  a:\n  b: {from: a, defenses: [ensemble: {members: [^aa]}]}\n", "there is no variant 'aa'"),
        ("  a:\n  b: {from: a, defenses: [ensemble: {members: [^a]}]}\n", "it would answer twice"),
        ("  a:\n  c:\n  b: {from: a, defenses: [ensemble: {members: [c, ^c]}]}\n", "'c' is named twice"),
        ("  a:\n  b: {from: a, defenses: [ensemble: {members: ^[]}]}\n", "members"),
        ("  a:\n  b: {from: a, defenses: [^ensemble]}\n", "members is missing"),
        ("  a: {defenses: [ensemble: {members: [^a]}]}\n", "`members` goes in a circle: a -> a"),
        (
            "  a: {defenses: [ensemble: {members: [^b]}]}\n  b: {from: a, train: {}}\n",
            "`from` and `members` go in a circle: a -> b -> a",
        ),
        ("  a:\n  b: {from: a, defenses: [ensemble: {members: ^[3]}]}\n", "members"),
    ],
)
def test_mistakes_are_shown_at_their_place(variants: str, words: str) -> None:
    before = (HEAD + variants).partition("^")[0].split("\n")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(HEAD + variants.replace("^", ""))
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0].message
    assert f":{len(before)}:{len(before[-1]) + 1}:" in str(caught.value)


def test_a_matrix_names_members() -> None:
    found = parse_recipe(
        HEAD
        + "  a:\n  b:\n  c:\n  with-$who: {matrix: {who: [b, c]}, from: a, defenses: [ensemble: {members: [$who]}]}\n"
    )
    assert found.variant("with-c").members == {"ensemble": ("c",)}
