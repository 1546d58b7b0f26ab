"""AutoAttack's look at what other attacks left, and attacks that begin with what fooled a relative."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import robustkit
from robustkit import stats
from robustkit.attacks.after import After
from robustkit.attacks.autoattack import AutoAttack
from robustkit.attacks.counting import CountedModel
from robustkit.attacks.threat import Threat
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.audit import audit, sample
from robustkit.evaluation.compare import audit_flags

CPU = torch.device("cpu")
SMALL = AutoAttack(steps=5, n_queries=10)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()


def examples(model: nn.Module, count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return x, model(x).argmax(1)


@settings(deadline=None)
@given(total=st.integers(1, 60), data=st.data())
def test_hypergeometric_bounds_hold_the_truth_with_their_confidence(total: int, data: st.DataObject) -> None:
    from scipy.stats import hypergeom

    truth = data.draw(st.integers(0, total))
    drawn = data.draw(st.integers(0, total))
    missed = 0.0
    for hits in range(max(0, drawn - (total - truth)), min(truth, drawn) + 1):
        low, high = stats.hypergeometric(hits, drawn, total)
        assert hits <= low <= high <= total - (drawn - hits)
        missed += float(hypergeom.pmf(hits, total, truth, drawn)) * (not low <= truth <= high)
    assert missed <= 0.05 + 1e-9


def test_hypergeometric_knows_all_when_all_are_drawn() -> None:
    assert stats.hypergeometric(3, 10, 10) == (3, 3)
    assert stats.hypergeometric(0, 0, 0) == (0, 0), "nothing withstood the attacks"
    assert stats.hypergeometric(0, 0, 10) == (0, 10)
    with pytest.raises(ValueError, match="cannot be"):
        stats.hypergeometric(3, 2, 10)


def test_sample_takes_survivors_only_and_each_once() -> None:
    survivors = np.arange(50) % 2 == 0
    chosen = sample(survivors, 7, seed=1)
    assert chosen.sum() == 7
    assert not (chosen & ~survivors).any()
    assert np.array_equal(sample(survivors, 99, seed=1), survivors)
    assert not np.array_equal(chosen, sample(survivors, 7, seed=2))


def test_audit_finds_what_a_weak_attack_missed() -> None:
    model = linear()
    x, y = examples(model)
    threat = Threat("linf", 0.1)
    everyone = np.ones(len(y), dtype=bool)
    found = audit(model, x, y, threat, survivors=everyone, count=20, seed=0, batch_size=8, device=CPU, attack=SMALL)
    chosen = sample(everyone, 20, 0)
    exact = _exact(model, x, y, 0.1)
    assert (found.n, found.survivors, found.examined) == (40, 40, 20)
    assert found.broken == int((chosen & ~exact).sum()) > 0
    assert found.low <= int((~exact).sum()) <= found.high
    (flag,) = audit_flags(found)
    assert (flag.id, flag.severity) == ("audit", "doubt")
    assert f"{found.broken} of 20" in flag.message


def _exact(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Say which examples are robust: the best change of a linear margin within the ball and the box is a corner."""
    weight, bias = model[1].weight.detach(), model[1].bias.detach()  # type: ignore[index]
    flat = x.flatten(1)
    room = weight[None] - weight[y][:, None]
    moved = torch.where(room > 0, (flat + eps).clamp(0, 1)[:, None], (flat - eps).clamp(0, 1)[:, None])
    margins = (room * moved).sum(2) + bias[None] - bias[y][:, None]
    margins[torch.arange(len(y)), y] = -torch.inf
    return (margins.amax(1) <= 0).numpy()


def test_an_audit_without_a_find_raises_no_flag() -> None:
    model = linear()
    x, y = examples(model)
    robust = _exact(model, x, y, 0.01)
    threat = Threat("linf", 0.01)
    found = audit(model, x, y, threat, survivors=robust, count=5, seed=0, batch_size=8, device=CPU, attack=SMALL)
    assert found.broken == 0
    assert audit_flags(found) == []
    assert audit_flags(None) == []


@pytest.mark.slow
def test_evaluate_audits_its_survivors() -> None:
    model = linear()
    x, y = examples(model)
    found = robustkit.evaluate(model, x, y, threat=Threat("linf", 0.05), attacks=["noise"], audit=3)
    assert found.audit is not None
    assert found.audit.examined == 3
    assert str(found.audit) in repr(found)
    # 7,856 forwards and one look; a survivor has all 1,910 backwards, what falls may have fewer.
    assert found.audit.forwards <= 3 * 7857


def test_after_attacks_only_what_the_given_images_leave() -> None:
    model = linear()
    x, y = examples(model, 10)
    others = x[torch.arange(10).roll(1)]
    counted = CountedModel(model)
    threat = Threat("linf", 1.0)
    with torch.no_grad():
        left = int((model(others).argmax(1) == y).sum())
    seen: list[int] = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        seen.append(len(x))
        return x

    found = After(others, attack)(counted, x, y, threat, generator=torch.Generator())
    assert seen == [left]
    with torch.no_grad():
        fooled = model(others).argmax(1) != y
    assert torch.equal(found[fooled], others[fooled])
    assert torch.equal(found[~fooled], x[~fooled])


def test_probes_outside_the_ball_are_put_into_it() -> None:
    model = linear()
    x, y = examples(model, 10)
    clean = clean_outcome(model, x, y, batch_size=8, device=CPU)
    outcome = attack_outcome(
        model,
        x,
        y,
        lambda model, x, y, threat, *, generator: x,
        Threat("linf", 0.05),
        clean=clean,
        seed=0,
        label="it",
        batch_size=4,
        device=CPU,
        probes=torch.zeros_like(x),
    )
    assert outcome.projected == 0
    assert outcome.distance.max() <= 0.05 + 1e-6


RECIPE = """
data: digits
model: {small_cnn: {widths: [4, 8]}}
threat: {norm: linf, eps: 0.1}
train: {epochs: 1}
variants:
  baseline:
  child: {from: baseline, compress: [global_l1: {sparsity: 1%}], train: null}
evaluate: {examples: 40, attacks: [cascade: {budget: quick}], audit: 2, latency: false}
"""


@pytest.mark.slow
def test_a_run_audits_and_tries_the_parents_images_on_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustkit.steps.evaluate.LONG", 0.0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    results = robustkit.run(recipe, runs=tmp_path)
    rows = {row.name: row for row in results.variants}
    assert all(row.audit is not None and row.audit.examined <= 2 for row in rows.values())
    assert any("audit: AutoAttack breaks" in note for note in rows["baseline"].notes)
    events = [json.loads(line) for line in (tmp_path / "recipe" / "events.jsonl").read_text().splitlines()]
    estimates = [event for event in events if event["event"] == "estimate"]
    # 7,856 forwards, 1,910 backwards and one look: what an example costs that withstands AutoAttack.
    assert [event["autoattack_passes"] for event in estimates] == [pytest.approx(9767, abs=10)] * 2
    written = json.loads((tmp_path / "recipe" / "results.json").read_text())
    assert written["variants"][0]["audit"]["n"] == 40
    fooling = list((tmp_path / "recipe").glob("steps/*/fooling.npz"))
    assert len(fooling) == 1, "the child is nobody's parent"
    # A child that is hardly changed falls to most of the same images.
    assert rows["child"].attacks["cascade"].value <= rows["baseline"].attacks["cascade"].value
    assert rows["child"].backwards < rows["baseline"].backwards
