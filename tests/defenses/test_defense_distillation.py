"""Distillation against closed forms: losses, attacks, and a teacher that nothing moves."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.checkpoint import StateFile
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset
from robustkit.defenses.distillation import (
    Ard,
    Distill,
    Rslad,
    ard_loss,
    distillation_loss,
    rslad_examples,
    rslad_loss,
    taught_loss,
)
from robustkit.defenses.inner import pgd_examples
from robustkit.defenses.teacher import Teacher
from robustkit.errors import ModelError, UsageError
from robustkit.models.small_cnn import SmallCnn
from robustkit.recipe.cost import parameter_of, training_passes
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import TrainSpec, Use
from robustkit.train.hooks import Batch, Defense, Forward, Step
from robustkit.train.loop import Fitted, OnEvent, fit
from robustkit.train.step import train_step

CPU = torch.device("cpu")
THREAT = Threat("linf", 0.1)
LABELS = torch.tensor([2, 0, 1, 2])


def logits(seed: int, classes: int = 3) -> Tensor:
    return torch.randn(4, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() * 3


def step_of(model: nn.Module, seed: int = 0) -> Step:
    return Step(model, 0, 1, 0.5, THREAT, torch.Generator().manual_seed(seed))


class Counted(nn.Module):
    """A small classifier that counts its forwards, and notes how it was asked."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.BatchNorm2d(1)
        self.head = nn.Linear(16, classes)
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append((self.training, torch.is_grad_enabled()))
        found: Tensor = self.head(self.norm(x).flatten(1))
        return found


def batch() -> Batch:
    return Batch(torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(3)), LABELS, torch.arange(4), 3)


def test_the_loss_of_two_classes_by_hand() -> None:
    for temperature in (1.0, 4.0, 30.0):
        teacher = torch.tensor([[temperature * math.log(3), 0.0]])
        by_hand = temperature**2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
        assert distillation_loss(torch.zeros(1, 2), teacher, temperature).item() == pytest.approx(by_hand, rel=1e-5)


def test_its_gradient_is_the_difference_of_the_softened_answers() -> None:
    for temperature in (1.0, 4.0):
        student = logits(0).requires_grad_()
        distillation_loss(student, logits(1), temperature).sum().backward()
        wanted = temperature * ((student / temperature).softmax(1) - (logits(1) / temperature).softmax(1))
        torch.testing.assert_close(student.grad, wanted.detach(), atol=1e-5, rtol=1e-5)


def test_a_high_temperature_matches_the_logits_themselves() -> None:
    # Hinton et al. 2015, section 2.1: for logits of mean zero the gradient becomes (z - v) / classes.
    student, teacher = (one - one.mean(1, keepdim=True) for one in (logits(0), logits(1)))
    student.requires_grad_()
    distillation_loss(student, teacher, 3000.0).sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 3, atol=2e-2, rtol=2e-2)


@given(st.lists(st.floats(-20, 20), min_size=6, max_size=6), st.floats(0.5, 50), st.floats(-5, 5))
def test_it_is_never_negative_and_nothing_for_equal_answers(values: list[float], temperature: float, by: float) -> None:
    student, teacher = torch.tensor(values).view(2, 1, 3)
    slack = 1e-5 * temperature**2
    assert distillation_loss(student, teacher, temperature).item() >= -slack
    assert distillation_loss(teacher + by, teacher, temperature).abs().item() <= slack


def test_weights_mix_the_terms() -> None:
    student, clean, teacher = logits(0), logits(1), logits(2)
    answered = distillation_loss(student, teacher, 4.0)
    entropy = nn.functional.cross_entropy(student, LABELS, reduction="none")
    mixed = taught_loss(student, teacher, LABELS, temperature=4.0, weight=0.25)
    torch.testing.assert_close(mixed, answered / 4 + entropy * 3 / 4)
    entropy = nn.functional.cross_entropy(clean, LABELS, reduction="none")
    mixed = ard_loss(student, clean, teacher, LABELS, temperature=4.0, weight=0.25)
    torch.testing.assert_close(mixed, answered / 4 + entropy * 3 / 4)
    mixed = rslad_loss(student, clean, teacher, weight=5 / 6)
    wanted = [5 / 6 * distillation_loss(student, teacher, 1.0), 1 / 6 * distillation_loss(clean, teacher, 1.0)]
    torch.testing.assert_close(mixed, wanted[0] + wanted[1])


def test_labels_that_weigh_nothing_are_not_looked_at() -> None:
    student = torch.tensor([[0.0, -math.inf]])
    found = taught_loss(student + 0, torch.zeros(1, 2), torch.tensor([1]), temperature=1.0, weight=1.0)
    assert found.item() == math.inf
    assert torch.isfinite(taught_loss(logits(0), logits(1), LABELS, temperature=1.0, weight=1.0)).all()
    assert Ard().weight == 1.0
    model, counted = Counted(), batch()
    ard, forward = Ard(steps=1), Forward(model, counted)
    ard.take_teacher(Counted(1))
    counted.x_adv = counted.x * 0.9
    ard.objective(counted, forward, step_of(model))
    assert len(model.asked) == 1, "the clean images cost a forward for nothing"


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(ModelError, match=r"\(4, 5\), the student with \(4, 3\)"):
        distillation_loss(logits(0), logits(1, classes=5), 1.0)


def test_one_step_away_from_a_teachers_answers_by_hand() -> None:
    # Of a linear student the gradient of KL(p || softmax(W x)) is W^T (softmax(W x) - p).
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, teacher = batch().x, logits(5)
    weight = model[1].weight
    assert isinstance(weight, Tensor)
    direction = ((model(x).softmax(1) - teacher.softmax(1)) @ weight).sign().view_as(x)
    generator = torch.Generator().manual_seed(0)
    found = rslad_examples(model, x, teacher, THREAT, steps=1, alpha=0.04, generator=generator, spread=0.0)
    torch.testing.assert_close(found, (x + 0.04 * direction).clamp(0, 1))
    many = rslad_examples(model, x, teacher, THREAT, steps=9, alpha=0.04, generator=generator, spread=0.0)
    torch.testing.assert_close((many - x).abs().amax(), torch.tensor(0.1))


def test_ard_attacks_the_student_by_the_labels_alone() -> None:
    model, ard = Counted(), Ard(steps=3)
    found = ard.perturb(batch(), step_of(model))
    generator = torch.Generator().manual_seed(0)
    wanted = pgd_examples(model, batch().x, LABELS, THREAT, steps=3, alpha=2.5 * 0.1 / 3, generator=generator)
    assert torch.equal(found, wanted)


def test_where_another_defense_perturbs_the_teacher_sees_the_clean_images() -> None:
    model, teacher, seen = Counted().eval(), Counted(1).eval(), batch()
    distill = Distill(temperature=2.0, weight=1.0)
    distill.take_teacher(teacher)
    seen.x_adv = seen.x * 0.5
    found = distill.objective(seen, Forward(model, seen), step_of(model))
    torch.testing.assert_close(found, distillation_loss(model(seen.x_adv), teacher(seen.x), 2.0))


def test_a_teacher_is_a_frozen_copy_that_answers_once() -> None:
    model = Counted().train()
    state = copy.deepcopy(model.state_dict())
    teacher, x = Teacher(model), batch().x
    first = teacher.logits(x)
    assert not first.requires_grad
    assert teacher.logits(x) is first
    assert not model.asked, "the model itself was used"
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    copied = teacher._model
    assert isinstance(copied, Counted)
    # The first look is at the layout, the second at the images.
    assert copied.asked == [(False, False)] * 2
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(torch.equal(value, state[name]) for name, value in copied.state_dict().items())
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(teacher.logits(x + 0), first), "what happens to the model reaches its copy"
    assert not torch.equal(teacher.logits(x * 0.5), first)


def test_a_teacher_that_needs_another_layout_than_its_student() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            found = self.conv(x)
            return found.view(len(x), 4, -1).mean(2)

    torch.manual_seed(0)
    model, x = Viewed(), torch.rand(2, 3, 8, 8)
    found = Teacher(model).logits(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, model(x))


COSTS = {
    "distill": Distill(),
    "ard": Ard(steps=2),
    "ard: {weight: 0.5}": Ard(weight=0.5, steps=2),
    "rslad": Rslad(steps=2),
    "rslad: {weight: 1}": Rslad(weight=1.0, steps=2),
}


@pytest.mark.parametrize("written", COSTS)
def test_a_step_costs_what_check_says_and_leaves_the_teacher_alone(written: str) -> None:
    defense, model, teacher = COSTS[written], Counted(), Counted(1)
    defense.take_teacher(teacher)  # type: ignore[attr-defined]
    held = defense._seat.taken._model  # type: ignore[attr-defined]
    held_state = copy.deepcopy(held.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_step(model, batch(), [(defense, step_of(model))], optimizer, precision=None)
    asked = len(model.asked)
    trained = sum(training for training, _ in model.asked)
    # A look at the layout comes before the first answer.
    assert len(held.asked) == 2
    assert all(torch.equal(value, held_state[name]) for name, value in held.state_dict().items())
    passes = 2 * (asked - trained) + 3 * trained + 1
    name, _, given = written.partition(": ")
    steps = "" if name == "distill" else f"{{steps: 2, {given[1:-1]}}}"
    text = f"data: digits\nmodel: small_cnn\nvariants: {{a: , b: {{teacher: a, defenses: [{name}: {steps}]}}}}\n"
    recipe = parse_recipe(text + "train: {epochs: 1}\n")
    assert training_passes(recipe.variant("b"), parameter_of(recipe)) == passes


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    use = Use(name="digits", parameters={"limit": 400}, label="digits")
    return load_dataset(use, cache=tmp_path_factory.mktemp("cache"))


def cnn(seed: int, widths: list[int]) -> nn.Module:
    torch.manual_seed(seed)
    return SmallCnn((1, 8, 8), 10, widths)


def quiet(name: str, values: Mapping[str, Any]) -> None:
    """Listen to nothing."""


def trained(
    model: nn.Module,
    data: Dataset,
    defense: Defense | None,
    epochs: int,
    *,
    checkpoint: StateFile | None = None,
    on_event: OnEvent = quiet,
) -> Fitted:
    sgd = Use(name="sgd", parameters={"lr": 0.05, "momentum": 0.9}, label="sgd")
    spec = TrainSpec(epochs=epochs, batch_size=64, optimizer=sgd, precision="fp32", select="last")
    named = [("d", defense)] if defense is not None else []
    settings: dict[str, Any] = {"threat": THREAT, "seed": 0, "key": "k", "device": CPU, "checkpoint": checkpoint}
    return fit(model, data, spec, named, on_event=on_event, **settings)


def taught(defense: Defense, teacher: nn.Module) -> Defense:
    defense.take_teacher(teacher)
    return defense


def test_a_student_learns_from_answers_alone(digits: Dataset) -> None:
    teacher = trained(cnn(0, [16, 32]), digits, None, 8).model
    labels = digits.train.labels[torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))]
    lied = replace(digits, train=replace(digits.train, labels=labels))
    weights = copy.deepcopy(teacher.state_dict())
    student = trained(cnn(1, [8, 16]), lied, taught(Distill(weight=1.0), teacher), 8).model
    x, y = digits.test.floats(0, len(digits.test)), digits.test.labels
    with torch.no_grad():
        right = (student(x).argmax(1) == y).float().mean()
        known = (teacher(x).argmax(1) == y).float().mean()
    assert known > 0.85
    assert right > known - 0.15
    assert list(student.state_dict()) == list(cnn(1, [8, 16]).state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


def test_a_training_goes_on_with_the_numbers_of_an_undisturbed_one(digits: Dataset, tmp_path: Path) -> None:
    def stop(name: str, values: Mapping[str, Any]) -> None:
        if name == "epoch" and values["epoch"] == 1:
            raise KeyboardInterrupt

    def run(checkpoint: StateFile | None, on_event: OnEvent = quiet) -> Fitted:
        defense = taught(Rslad(steps=1), cnn(0, [4]))
        return trained(cnn(1, [4]), digits, defense, 3, checkpoint=checkpoint, on_event=on_event)

    whole, state = run(None), StateFile(tmp_path / "state", print)
    with pytest.raises(KeyboardInterrupt):
        run(state, stop)
    started: list[str] = []
    resumed = run(state, lambda name, values: started.append(name))
    assert "resume" in started
    assert len(resumed.epochs) == 3
    assert all(torch.equal(value, whole.last_state[name]) for name, value in resumed.last_state.items())


@pytest.mark.parametrize("defense", [Distill(), Ard(steps=1), Rslad(steps=1)])
def test_without_a_teacher_there_is_no_training(defense: Defense, digits: Dataset) -> None:
    with pytest.raises(UsageError, match=r"has no teacher: write `teacher: <variant>`.*take_teacher"):
        trained(cnn(0, [4]), digits, defense, 1)
