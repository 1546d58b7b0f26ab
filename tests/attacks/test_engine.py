"""Lower precision and compilation search faster where they are faster; what they find is judged without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import digits, slack, softmax_regression
from torch import Tensor, nn

import robustkit
from robustkit.attacks import engine
from robustkit.attacks.cascade import Cascade
from robustkit.attacks.engine import PLAIN, Allowed, Engine, choose_engine, takes, worth_bf16
from robustkit.attacks.threat import Threat
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.outcome import Outcome

CPU = torch.device("cpu")


def attacked(model: nn.Module, x: Tensor, y: Tensor, allowed: Allowed, eps: float = 0.1) -> tuple[Outcome, Outcome]:
    clean = clean_outcome(model, x, y, batch_size=512, device=CPU)
    threat, attack = Threat("linf", eps), Cascade()
    return clean, attack_outcome(
        model, x, y, attack, threat, clean=clean, seed=0, label="a", batch_size=512, device=CPU, allowed=allowed
    )


class Coarse(nn.Module):
    """Logits near 100 of a softmax regression: bfloat16 rounds them to halves, so that close ones look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = softmax_regression()
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        self.seen.add(logits.dtype)
        return logits if logits.dtype == torch.float32 else (logits + 100).to(torch.bfloat16).float()


def test_what_is_found_in_lower_precision_is_confirmed_or_searched_on() -> None:
    x, y = (part[:80] for part in digits())
    model = Coarse()
    left = slack(model.inner, x, y, "linf", 0.1)
    clean, lower = attacked(model, x, y, Allowed("bf16"))
    assert model.seen == {torch.float32, torch.bfloat16}, "it searched in lower precision"
    _, exact = attacked(model, x, y, Allowed("fp32"))
    clear = np.abs(left) > 1e-3
    expected = clean.correct & (left > 0)
    assert (exact.correct[clear] == expected[clear]).all()
    # One way only: a coarse search may miss an example, it may not count one that the model withstands.
    assert not (expected & ~lower.correct)[clear].any()
    assert (lower.correct & ~expected)[clear].mean() < 0.05


class Liar(nn.Module):
    """Says in any precision but its own that the image is of another class as soon as it is changed at all."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.inner, self.clean = softmax_regression(), x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        if logits.dtype == torch.float32:
            return logits
        moved = (torch.cdist(x.flatten(1).float(), self.clean).amin(1) > 1e-3)[:, None]
        return torch.where(moved, logits.roll(1, 1), logits)


def test_a_success_that_is_none_does_not_end_the_attack() -> None:
    x, y = (part[:60] for part in digits())
    model = Liar(x)
    left = slack(model.inner, x, y, "linf", 0.1)
    clean, found = attacked(model, x, y, Allowed("bf16"))
    clear = np.abs(left) > 1e-3
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()


def test_what_a_model_does_not_take_is_not_used() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1) @ torch.ones(64, 3)
            if z.dtype != torch.float32:
                raise TypeError("float32 only")
            return z

    x = torch.rand(4, 1, 8, 8)
    assert choose_engine(Strict(), x, Allowed("bf16")) == PLAIN
    assert not takes(Strict(), x, Engine(precision=torch.bfloat16))


class Clock:
    """A clock that only models move."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(nn.Module):
    """As slow as told, in float32 and in bfloat16."""

    def __init__(self, clock: Clock, usual: float, lower: float) -> None:
        super().__init__()
        self.clock, self.usual, self.lower = clock, usual, lower

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ torch.ones(64, 3)
        self.clock.now += self.usual if z.dtype == torch.float32 else self.lower
        return z


@pytest.mark.parametrize(("usual", "lower", "used"), [(1.3, 1.0, True), (1.1, 1.0, False), (1.0, 2.0, False)])
def test_auto_takes_lower_precision_where_it_measures_faster(
    monkeypatch: pytest.MonkeyPatch, usual: float, lower: float, used: bool
) -> None:
    clock, x = Clock(), torch.rand(4, 1, 8, 8)
    monkeypatch.setattr(engine, "time", clock)
    monkeypatch.setattr(engine, "worth_bf16", lambda device: True)
    model = Timed(clock, usual, lower)
    assert choose_engine(model, x, Allowed("auto")).exact is not used
    assert choose_engine(model, x, Allowed("fp32")).exact
    monkeypatch.setattr(engine, "worth_bf16", lambda device: False)
    assert choose_engine(model, x, Allowed("auto")).exact


def test_auto_leaves_a_model_in_its_own_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "has_bf16", lambda device: True)
    assert not worth_bf16(torch.device("cpu"))
    assert worth_bf16(torch.device("cuda"))


@pytest.mark.parametrize("gain", [True, False])
def test_compilation_is_used_where_it_measures_faster(monkeypatch: pytest.MonkeyPatch, gain: bool) -> None:
    clock, x = Clock(), torch.rand(4, 1, 8, 8)
    monkeypatch.setattr(engine, "time", clock)
    model, other = Timed(clock, 1.0, 1.0), Timed(clock, 0.5 if gain else 0.9, 1.0)
    monkeypatch.setattr(engine.torch, "compile", lambda module, dynamic: other)
    assert (choose_engine(model, x, Allowed(compile=True)).run is other) is gain
    assert choose_engine(model, x, Allowed()).run is None


@pytest.mark.slow
def test_a_compiled_model_is_attacked_like_the_model_itself() -> None:
    x, y = (part[:60] for part in digits())
    model = softmax_regression()
    compiled = Engine(run=torch.compile(model, dynamic=True))
    assert takes(model, x, compiled)
    torch.testing.assert_close(compiled(model, x[:7]), model(x[:7]))
    found = robustkit.evaluate(model, x, y, threat=Threat("linf", 0.1), attacks=["pgd"], compile=True, precision="bf16")
    assert found.worst.value <= found.clean.value
