"""Every check by its id: one model that trips it, and one that does not."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import robustkit
from robustkit import stats
from robustkit.attacks.threat import Threat
from robustkit.evaluation import rules
from robustkit.evaluation.checks.batch import Batch
from robustkit.evaluation.checks.by_attack import probes
from robustkit.evaluation.checks.dynamic import backwards_within
from robustkit.evaluation.checks.images import off_grid
from robustkit.evaluation.checks.selftest import oracle_flags, self_test
from robustkit.evaluation.checks.smoothness import instability
from robustkit.evaluation.reporting import curve_flags, default_of, same_attack_flags
from robustkit.recipe.spec import Use
from robustkit.results import Curve, Flag

CPU = torch.device("cpu")
THREAT = Threat("linf", 0.1)
Found = dict[str, str]


def found_in(flags: list[Flag]) -> Found:
    return {flag.id: flag.severity for flag in flags}


def diagnosed(model: Callable[[Tensor], Tensor], threat: Threat = THREAT, **given: nn.Module) -> Found:
    _, _, x, y = zoo.digits()
    return found_in(robustkit.diagnose(model, x[:100], y[:100], threat, **given).flags)


def test_a_sound_model_has_no_flag_at_all() -> None:
    found = robustkit.diagnose(zoo.robust(), *zoo.digits()[2:], THREAT)
    assert [flag for flag in found.flags if flag.severity != "note"] == []
    assert found.examples == 64
    assert repr(found).startswith("diagnosis on 64 images, linf eps 0.1: ")


def test_the_worst_comes_first_and_every_sentence_says_what_to_do() -> None:
    _, _, x, y = zoo.digits()
    found = robustkit.diagnose(zoo.ZOO["rounded"]().model, x, y, THREAT)
    order = ["wrong", "doubt", "note"]
    places = [order.index(flag.severity) for flag in found.flags]
    assert places == sorted(places)
    assert len(set(places)) > 1
    lines = repr(found).splitlines()
    assert lines[0] == "diagnosis on 64 images, linf eps 0.1: 2 wrong, 2 doubt"
    assert len(lines) == 1 + len(found.flags)


def test_a_diagnosis_is_the_same_twice_and_disturbs_nothing() -> None:
    _, _, x, y = zoo.digits()
    model = copy.deepcopy(zoo.ZOO["noisy"]().model).train()
    before = torch.get_rng_state()
    first = robustkit.diagnose(model, x, y, THREAT, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    torch.rand(5)
    assert first.flags == robustkit.diagnose(model, x, y, THREAT, seed=3).flags
    assert any(flag.id == "P1" for flag in first.flags)


def test_whole_images_and_half_of_the_batch_size_are_the_same() -> None:
    _, _, x, y = zoo.digits()
    whole = (x * 255).round().to(torch.uint8)
    first = robustkit.diagnose(zoo.fragile(), whole.numpy(), y.numpy(), THREAT, batch_size=16)
    assert first.flags == robustkit.diagnose(zoo.fragile(), x, y, THREAT).flags


def test_an_eps_of_zero_and_one_image_are_no_reason_to_fail() -> None:
    _, _, x, y = zoo.digits()
    assert "wrong" not in diagnosed(zoo.robust(), Threat("linf", 0.0)).values()
    found = robustkit.diagnose(zoo.robust(), x[:1], y[:1], THREAT)
    assert [flag for flag in found.flags if flag.severity != "note"] == []


def test_under_l0_all_is_compared_that_can_be() -> None:
    few = Threat("l0", 3)
    assert set(diagnosed(zoo.ZOO["loud"]().model, few)) >= {"P10", "E11"}
    assert {"P9", "E5"} <= set(diagnosed(zoo.ZOO["killed"]().model, few, surrogate=zoo.fragile()))
    assert set(diagnosed(zoo.robust(), few).values()) <= {"note"}


class First(nn.Module):
    """The first classes alone."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.inner = classes, zoo.robust()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits[:, : self.classes]


@pytest.mark.parametrize(("classes", "expected"), [(2, "difference"), (3, "targeted difference"), (4, None)])
def test_p3_few_classes(classes: int, expected: str | None) -> None:
    _, _, x, y = zoo.digits()
    keep = y < classes
    found = [flag for flag in robustkit.diagnose(First(classes), x[keep], y[keep], THREAT).flags if flag.id == "P3"]
    assert [flag.severity for flag in found] == (["note"] if expected else [])
    assert expected is None or expected in found[0].message


class Purifies(nn.Module):
    """Moves the image up its own likeliest class before it answers; `call` is how it asks for the gradient."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.inner, self.call = zoo.robust(), call

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = x.detach().clone().requires_grad_(True)
            best = self.inner(moved).amax(1).sum()
            if self.call == "grad":
                (gradient,) = torch.autograd.grad(best, moved)
            else:
                best.backward()
                assert moved.grad is not None
                gradient = moved.grad
        logits: Tensor = self.inner(x + 0.01 * gradient.sign())
        return logits


class Checkpointed(nn.Module):
    """Computes its middle again in the backward pass: nothing of it runs while it goes forward."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = checkpoint(zoo.robust(), x, use_reentrant=False)
        return logits


def test_p4_a_backward_pass_within_the_forward() -> None:
    assert diagnosed(Purifies("grad"))["P4"] == "doubt"
    assert diagnosed(Purifies("backward"))["P4"] == "doubt"
    assert "P4" not in diagnosed(Checkpointed())
    x = zoo.digits()[2][:4]
    with torch.no_grad():
        assert backwards_within(Purifies("grad"), x) > 0
        assert backwards_within(zoo.robust(), x) == 0


def test_p6_images_off_the_grid() -> None:
    _, _, x, y = zoo.digits()
    smooth = nn.functional.interpolate(x, size=(9, 9), mode="bilinear")[..., :8, :8]
    assert found_in(robustkit.diagnose(zoo.robust(), smooth, y, THREAT).flags)["P6"] == "note"
    assert "P6" not in diagnosed(zoo.robust())
    assert off_grid(torch.zeros(0, 1, 8, 8)) == []


def test_p10_cross_entropy_that_is_spent() -> None:
    assert diagnosed(zoo.ZOO["loud"]().model)["P10"] == "doubt"
    assert diagnosed(zoo.Sees(zoo.fragile(), None, lambda logits: 6 * logits))["P10"] == "note"
    assert "P10" not in diagnosed(zoo.fragile())


def test_p11_gradients_that_mislead() -> None:
    waves = zoo.Sees(zoo.fragile(), lambda x: x + 0.02 * torch.sin(5e4 * x), None)
    assert diagnosed(waves)["P11"] == "wrong"
    assert "P11" not in diagnosed(zoo.fragile())
    assert "P11" not in diagnosed(zoo.fragile(), Threat("l1", 3.0))


def test_p12_a_rough_loss() -> None:
    _, _, x, y = zoo.digits()
    rough = zoo.Sees(zoo.fragile(), None, lambda logits: logits * (1.1 + torch.sin(40 * logits)))
    severities = []
    for model in (zoo.fragile(), zoo.ZOO["k-winners"]().model, rough):
        right = model(x).argmax(1) == y
        severities += [flag.severity for flag in instability(Batch(model, x[right], y[right], THREAT, 0))]
    assert severities == ["note", "doubt"]


class Bait(nn.Module):
    """Its gradient points to the other class at the gray image, and away from it all around."""

    def forward(self, x: Tensor) -> Tensor:
        away = (x - 0.5).flatten(1).mean(1) / 0.1
        reached = torch.where(away > 0.95, 2.0, torch.where(away.abs() < 0.02, away, -away))
        return torch.stack([torch.full_like(reached, 1.5), reached], 1)


def test_e2_e3_and_e4_weaker_attacks_that_find_more() -> None:
    x, y = torch.full((40, 1, 1, 2), 0.5), torch.zeros(40, dtype=torch.int64)
    x += 1e-5 * torch.arange(40).view(-1, 1, 1, 1)
    assert found_in(probes(Bait(), x, y, THREAT, seed=0, device=CPU))["E2"] == "wrong"
    rounded = diagnosed(zoo.ZOO["rounded"]().model)
    assert (rounded["E3"], rounded["E4"]) == ("doubt", "doubt")
    assert not {"E2", "E3", "E4"} & set(diagnosed(zoo.fragile()))


def test_e5_images_of_a_surrogate() -> None:
    killed = zoo.ZOO["killed"]().model
    assert diagnosed(killed, surrogate=zoo.fragile())["E5"] == "wrong"
    assert "E5" not in diagnosed(killed)
    assert "E5" not in diagnosed(zoo.fragile(), surrogate=zoo.robust())
    assert diagnosed(zoo.fragile(), surrogate=zoo.ZOO["bit-depth"]().model)["E5"] == "note"


def test_e17_images_of_what_a_model_was_compressed_from() -> None:
    _, _, x, y = zoo.digits()

    def found(model: nn.Module, parent: nn.Module) -> Found:
        return found_in(probes(model, x, y, THREAT, seed=0, device=CPU, surrogate=parent, compressed=True))

    assert found(zoo.ZOO["rounded"]().model, zoo.fragile())["E17"] == "wrong"
    assert not {"E5", "E17"} & set(found(zoo.pruned(), zoo.robust()))


def of(right: int, total: int = 64) -> np.ndarray:
    return np.arange(total) < right


def test_e5_and_e17_by_how_many() -> None:
    for compressed, kind in ((False, "E5"), (True, "E17")):
        counted = [rules.transfer_flags(of(50), of(fooled), compressed=compressed) for fooled in (50, 49, 48, 46)]
        assert [found_in(flags) for flags in counted] == [{}, {}, {kind: "doubt"}, {kind: "wrong"}]


class Shell(nn.Module):
    """Wrong only in a thin shell around a gray image, which longer steps jump over."""

    def forward(self, x: Tensor) -> Tensor:
        away = (x - 0.5).flatten(1).mean(1)
        inside = ((away > 0.036) & (away < 0.0385)).float()
        return torch.stack([1 - 2 * inside, away], 1)


def test_e6_accuracy_that_rises_with_eps() -> None:
    x, y = torch.full((20, 1, 50, 50), 0.5), torch.zeros(20, dtype=torch.int64)
    found = found_in(probes(Shell(), x, y, Threat("linf", 0.05), seed=0, device=CPU))
    assert found["E6"] == "doubt"
    assert "E6" not in diagnosed(zoo.fragile())
    assert rules.monotone_flags([1, 2], [of(30), of(31)]) == []
    assert [flag.id for flag in rules.monotone_flags([1, 2, 4], [of(30), of(10), of(12)])] == ["E6"]


class OneAfterAnother(nn.Module):
    """Shows the gradient of one pixel at a time, the next when the one before has gone as far as eps allows."""

    def forward(self, x: Tensor) -> Tensor:
        moved = ((x.flatten(1) - 0.5) / 0.1).clamp(-1, 1)
        done = (moved > 0.95).float()
        before = torch.cat([torch.ones_like(done[:, :1]), done.cumprod(1)[:, :-1]], 1)
        reached = (moved * before).sum(1)
        return torch.stack([torch.full_like(reached, moved.shape[1] - 0.5), reached], 1)


def test_e8_an_attack_that_has_not_converged() -> None:
    x, y = torch.full((40, 1, 1, 5), 0.5), torch.zeros(40, dtype=torch.int64)
    assert found_in(probes(OneAfterAnother(), x, y, THREAT, seed=0, device=CPU))["E8"] == "doubt"
    assert "E8" not in diagnosed(zoo.fragile())
    counted = [rules.convergence_flags(of(50), of(fooled), 20) for fooled in (49, 48, 40)]
    assert [found_in(flags) for flags in counted] == [{}, {"E8": "note"}, {"E8": "doubt"}]


def loses(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
    """Meets an adversarial image and comes back with the image itself."""
    moved = x.clone().requires_grad_(True)
    nn.functional.cross_entropy(model(moved), y).backward()
    assert moved.grad is not None
    model((x + 0.1 * moved.grad.sign()).clamp(0, 1))
    return x


def strays(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
    """Looks at other images, others' images and parts of the batch, none of which count."""
    model((x + 0.5).clamp(0, 1))
    model(x.flip(0))
    model(1 - x[1:])
    model(x * 2 - 0.5)
    return x


def test_e9_adversarial_images_that_an_attack_met_and_lost() -> None:
    _, _, x, y = zoo.digits()
    attacks = {"loses": loses, "strays": strays, "torchattacks.PGD": {"steps": 5}, "pgd": {"steps": 5}}
    found = robustkit.evaluate(zoo.fragile(), x[:100], y[:100], threat=THREAT, attacks=attacks)  # type: ignore[arg-type]
    flags = [flag for flag in found.flags if flag.id == "E9"]
    assert [flag.severity for flag in flags] == ["doubt"]
    assert flags[0].message.startswith(f"loses met adversarial images of {found.outcomes['loses'].silent} examples")
    fgsm = robustkit.evaluate(zoo.fragile(), x[:100], y[:100], threat=THREAT, attacks=["fgsm"])
    assert found.outcomes["loses"].silent == int((fgsm.outcomes["clean"].correct & ~fgsm.correct).sum())
    assert found.outcomes["strays"].silent == found.outcomes["pgd"].silent == 0


class TwoSides(nn.Module):
    """Which side of gray the start lies on decides it: one leads to the other class, one to a wall."""

    def forward(self, x: Tensor) -> Tensor:
        away = (x - 0.5).flatten(1).mean(1) / 0.1
        reached = torch.where(away > 0, away, -0.5 * away)
        return torch.stack([torch.full_like(reached, 0.9), reached], 1)


def test_e10_a_start_that_finds_more() -> None:
    x, y = torch.full((40, 1, 1, 2), 0.5), torch.zeros(40, dtype=torch.int64)
    # Numbers belong to the pixels: images that are the same would all start alike.
    x += 1e-4 * torch.arange(40).view(-1, 1, 1, 1)
    assert found_in(probes(TwoSides(), x, y, THREAT, seed=0, device=CPU))["E10"] == "doubt"
    assert "E10" not in found_in(probes(zoo.robust(), *zoo.digits()[2:], Threat("linf", 0.02), seed=0, device=CPU))
    counted = [rules.restart_flags(of(50), of(fooled)) for fooled in (49, 48, 40)]
    assert [found_in(flags) for flags in counted] == [{}, {"E10": "note"}, {"E10": "doubt"}]


def test_e11_losses_that_disagree() -> None:
    assert diagnosed(zoo.ZOO["loud"]().model)["E11"] == "doubt"
    assert "E11" not in diagnosed(zoo.fragile())
    assert rules.loss_flags(of(35), of(30)) == [], "5 of 64 in one direction may be chance"
    assert "margin leaves 9.4%" in rules.loss_flags(of(30), of(36))[0].message


def test_e12_robust_against_one_step_alone() -> None:
    _, _, x, y = zoo.digits()

    def found(model: nn.Module, one_step: bool) -> Found:
        return found_in(probes(model, x, y, THREAT, seed=0, device=CPU, one_step=one_step))

    loud = zoo.ZOO["loud"]().model
    assert found(loud, True)["E12"] == "wrong"
    assert found(loud, False)["E12"] == "note"
    assert "E12" not in found(zoo.robust(), True)


def use(name: str, **parameters: object) -> Use:
    return Use(name=name, parameters=parameters, label=name)


@pytest.mark.parametrize(
    ("trained", "attacks", "expected"),
    [
        ([use("n_fgsm")], [use("fgsm"), use("noise")], True),
        ([use("n_fgsm")], [use("fgsm"), use("pgd", steps=2, loss="ce")], False),
        *(([use(name)], [use("fgsm")], True) for name in ("fgsm", "fgsm_rs", "free", "ensemble_training", "mart")),
        ([use("mart", steps=5), use("awp")], [use("pgd", steps=6, loss="ce")], False),
        ([use("pgd_training")], [use("pgd", steps=7, loss="ce")], True),
        ([use("pgd_training")], [use("pgd", steps=8, loss="ce")], False),
        ([use("pgd_training")], [use("pgd", steps=7)], False),
        ([use("pgd_training")], [use("pgd", steps=7, loss="ce", restarts=2)], False),
        ([use("trades", steps=20)], [use("torchattacks.PGD"), use("fgsm")], True),
        ([use("trades")], [use("cascade"), use("pgd", steps=2, loss="ce")], False),
        ([use("dropout")], [use("fgsm")], False),
        ([use("n_fgsm")], [use("noise")], False),
        ([], [use("fgsm")], False),
    ],
)
def test_e13_no_attack_but_the_one_trained_against(trained: list[Use], attacks: list[Use], expected: bool) -> None:
    found = found_in(same_attack_flags(trained, attacks, default_of))
    assert found == ({"E13": "doubt"} if expected else {})


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_e14_attacks_against_a_closed_form(norm: str) -> None:
    started = time.process_time()
    assert self_test(norm, CPU) == []  # type: ignore[arg-type]
    assert time.process_time() - started < 2

    class Weak:
        def __call__(
            self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator
        ) -> Tensor:
            return x

    (flag,) = oracle_flags("mine", Weak(), norm, CPU)  # type: ignore[arg-type]
    assert flag.severity == "wrong"
    assert "misses 32" in flag.message


def test_e14_an_attack_that_finds_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget that is read too large, what it finds does not count: it is the verdict that must be broken."""
    from robustkit.evaluation import attacked

    monkeypatch.setattr(attacked, "RELATIVE_SLACK", 10.0)

    class Far:
        def __call__(
            self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator
        ) -> Tensor:
            from robustkit.attacks.gradient import fgsm

            return fgsm(model, x, y, threat.scaled(3), loss="margin")

    (flag,) = oracle_flags("far", Far(), "linf", CPU)
    assert "fools 32 that cannot" in flag.message


def curve(*values: float, attack: str = "pgd") -> Curve:
    rates = [stats.clopper_pearson(round(value * 100), 100) for value in values]
    return Curve(attack=attack, norm="linf", eps=[0.1 * number for number in range(len(values))], rates=rates)


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ([], "no security curve"),
        ([curve(1.0, 0.9, attack="noise")], "no security curve"),
        ([curve(1.0, 0.5, 0.2), curve(1.0, 0.9, attack="noise")], "ends with 20.0% at eps 0.2"),
        ([curve(1.0, 0.5, 0.12), curve(1.0, 0.9, attack="noise")], None),
    ],
)
def test_e16_a_curve_that_ends_too_early(curves: list[Curve], expected: str | None) -> None:
    found = curve_flags(curves, 10)
    assert [flag.severity for flag in found] == (["note"] if expected else [])
    assert expected is None or expected in found[0].message


RECIPE = """\
name: flags
data: {digits: {limit: 600}}
model: {small_cnn: {widths: [8, 8]}}
threat: {norm: linf, eps: 0.1}
train: {epochs: 1, batch_size: 64}
variants:
  trained: {defenses: [n_fgsm]}
  pruned: {from: trained, compress: [global_l1: {sparsity: 50%}]}
  plain:
evaluate: {examples: 60, attacks: [fgsm], eps_curve: CURVE, latency: false}
"""


def test_a_run_carries_them(tmp_path: Path) -> None:
    def run(curve: str) -> Mapping[str, Found]:
        found = robustkit.run(RECIPE.replace("CURVE", curve), runs=tmp_path)
        return {row.name: found_in(row.flags) for row in found.variants}

    with_curve, without = run("[0.1, 1.0]"), run("[]")
    assert {name: flags.get("E13") for name, flags in with_curve.items()} == {
        "trained": "doubt",
        "pruned": "doubt",
        "plain": None,
    }
    assert all("E16" not in flags for flags in with_curve.values())
    assert all(flags["E16"] == "note" for flags in without.values())


def test_a_child_is_met_by_the_images_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustkit.steps import evaluate

    seen = []

    def spied(*given: object, **named: object) -> list[Flag]:
        seen.append((named["surrogate"] is not None, named["compressed"], named["one_step"]))
        return []

    monkeypatch.setattr(evaluate, "probes", spied)
    robustkit.run(RECIPE.replace("CURVE", "[]"), runs=tmp_path)
    assert seen == [(False, False, True), (True, True, True), (False, False, False)]
