"""The training loop: resumed bit for bit, guarded, the best epoch chosen on held-out data, right for any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustkit import registry
from robustkit.attacks import active, search
from robustkit.attacks.gradient import Fgsm, Pgd
from robustkit.attacks.noise import Noise
from robustkit.attacks.threat import Threat
from robustkit.checkpoint import StateFile
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import sparsity_of
from robustkit.compress.prune import GlobalL1
from robustkit.data.augment import Crop, Cutout, Flip
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset, Split, split_of
from robustkit.errors import TrainingError
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn
from robustkit.recipe.spec import TrainSpec, Use
from robustkit.results import EpochRow
from robustkit.train.guards import Guards
from robustkit.train.hooks import Batch, DataContext, Decision, Defense, EpochReport, Forward, Step
from robustkit.train.layout import to_channels_last
from robustkit.train.loop import Fitted, fit
from robustkit.train.optim import Constant, Cosine, OneCycle, StepDecay
from robustkit.train.step import train_step
from robustkit.train.validate import Attacked, clean_loss_and_accuracy, robust_accuracy

CPU = torch.device("cpu")
THREAT = Threat("linf", 0.1)


def use(name: str, **parameters: object) -> Use:
    return Use(name=name, parameters=parameters, label=name)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(use("digits", limit=400), cache=tmp_path_factory.mktemp("cache"))


def network(seed: int = 0) -> Normalized:
    torch.manual_seed(seed)
    return Normalized(SmallCnn((1, 8, 8), 10, [8, 16]), [0.3], [0.4])


def named(*uses: Use) -> list[tuple[str, Defense]]:
    return [(one.name, registry.create(registry.find("defense", one.name), one.parameters)) for one in uses]


def train(
    data: Dataset,
    defenses: Sequence[tuple[str, Defense]] = (),
    *,
    checkpoint: StateFile | None = None,
    model: nn.Module | None = None,
    events: list[tuple[str, Mapping[str, Any]]] | None = None,
    threat: Threat = THREAT,
    augment: bool = False,
    seed: int = 0,
    **spec: Any,
) -> Fitted:
    values: dict[str, Any] = {"epochs": 3, "batch_size": 64, "optimizer": use("sgd", lr=0.05, momentum=0.9), **spec}

    def on_event(event: str, found: Mapping[str, Any]) -> None:
        if events is not None:
            events.append((event, found))

    return fit(
        model or network(),
        data,
        TrainSpec(**values),
        defenses,
        threat=threat,
        seed=seed,
        key="test",
        device=CPU,
        on_event=on_event,
        checkpoint=checkpoint,
        augment=[Crop(1), Flip(), Cutout(2)] if augment else [],
    )


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


AVERAGED = ["ema", "swa", "lookahead", "sam", "spectral_norm"]


@pytest.mark.parametrize("name", AVERAGED)
def test_what_changes_the_weights_resumes_bit_for_bit(name: str, digits: Dataset, tmp_path: Path) -> None:
    """With growing masks, and with adversarial examples."""

    def defenses() -> list[tuple[str, Defense]]:
        parameters = {"swa": {"start": 0.3}}.get(name, {})
        return [("masks", keeper()), *named(use(name, **parameters), use("n_fgsm"), use("mixup"))]

    given: dict[str, Any] = {"epochs": 4, "guards": False, "select": "last"}
    straight = train(digits, defenses(), **given)
    file = StateFile(tmp_path / "state", lambda message: None)
    with pytest.raises(Stop):
        train(digits, defenses(), checkpoint=StopAfter(file, 2), **given)  # type: ignore[arg-type]
    resumed = train(digits, defenses(), checkpoint=file, **given)
    assert same(straight.model.state_dict(), resumed.model.state_dict())
    assert same(straight.last_state, resumed.last_state)
    assert list(straight.last_state) == list(network().state_dict())


@pytest.mark.parametrize("name", [*AVERAGED, "max_norm"])
def test_what_is_pruned_stays_zero_in_what_is_stored(name: str, digits: Dataset) -> None:
    """Before any mask is applied again: the evaluated weights are the ones that are stored."""
    masks = keeper()
    parameters = {"swa": {"start": 0.3}}.get(name, {})
    found = train(digits, [("masks", masks), *named(use(name, **parameters))], epochs=4, guards=False, select="last")
    assert masks.masks.tensors
    zeros = sum(int((mask == 0).sum()) for mask in masks.masks.tensors.values())
    assert zeros > 0.7 * sum(mask.numel() for mask in masks.masks.tensors.values())
    for state in (found.model.state_dict(), found.last_state):
        for parameter, mask in masks.masks.tensors.items():
            assert not state[parameter][mask == 0].any(), parameter


def test_the_stored_model_holds_the_average(digits: Dataset) -> None:
    plain, averaged = (train(digits, made, epochs=3) for made in ([], named(use("ema", decay=0.9))))
    assert plain.epochs[0].loss == averaged.epochs[0].loss, "training itself is not changed"
    assert not same(plain.last_state, averaged.last_state)


def test_it_learns_real_digits() -> None:
    data = load_dataset(use("digits"))
    found = train(data, epochs=6)
    assert clean_loss_and_accuracy(found.model, data.test, CPU)[1] > 0.9
    assert len(found.epochs) == 6
    assert found.epochs[-1].loss < 0.5 * found.epochs[0].loss


class Stop(Exception):
    """Stands for a kill: nothing in robustkit catches it."""


class StopAfter:
    """A checkpoint whose process dies right after the n-th save."""

    def __init__(self, inner: StateFile, saves: int) -> None:
        self.inner, self.left = inner, saves

    def load(self) -> dict[str, Any] | None:
        return self.inner.load()

    def save(self, state: dict[str, Any]) -> None:
        self.inner.save(state)
        self.left -= 1
        if not self.left:
            raise Stop


def keeper() -> MaskKeeper:
    method = GlobalL1(0.8, schedule="cubic", begin=0.0, end=0.7, updates=6)
    return MaskKeeper([method], inherit=False, context_seed=3, example=torch.zeros(2, 1, 8, 8), threat=THREAT)


@pytest.mark.parametrize("saves", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_that_was_killed_goes_on_bit_for_bit(
    optimizer: str, saves: int, digits: Dataset, tmp_path: Path
) -> None:
    """With momentum, dropout, augmentation, adversarial examples, sampling and growing masks."""

    def defenses() -> list[tuple[str, Defense]]:
        made = named(use("dropout", p=0.3), use("n_fgsm"), use("balanced_sampling"), use("label_smoothing", amount=0.1))
        return [*made, ("masks", keeper())]

    given: dict[str, Any] = {
        "epochs": 4,
        "augment": True,
        "optimizer": use(optimizer, lr=0.02),
        "schedule": use("cosine"),
        "guards": False,  # this much regularization on 360 images starts at chance
    }
    straight = train(digits, defenses(), **given)
    file = StateFile(tmp_path / "state", lambda message: None)
    with pytest.raises(Stop):
        train(digits, defenses(), checkpoint=StopAfter(file, saves), **given)  # type: ignore[arg-type]
    events: list[tuple[str, Mapping[str, Any]]] = []
    torch.rand(7)
    resumed = train(digits, defenses(), checkpoint=file, events=events, **given)
    assert ("resume", {"epoch": saves, "epochs": 4}) in events
    assert same(straight.model.state_dict(), resumed.model.state_dict())
    assert same(straight.last_state, resumed.last_state)
    without = [row.model_copy(update={"seconds": 0}) for row in straight.epochs]
    assert without == [row.model_copy(update={"seconds": 0}) for row in resumed.epochs]
    assert straight.best_epoch == resumed.best_epoch


def test_equal_seeds_give_equal_models_and_leave_the_global_generator_alone(digits: Dataset) -> None:
    before = torch.get_rng_state()
    model, other = network(), network()
    torch.set_rng_state(before)
    first = train(digits, named(use("n_fgsm")), model=model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second = train(digits, named(use("n_fgsm")), model=other)
    assert same(first.model.state_dict(), second.model.state_dict())
    third = train(digits, named(use("n_fgsm")), seed=1)
    assert not same(first.model.state_dict(), third.model.state_dict())


def test_a_stream_trains_to_the_same_bits_as_resident_data(digits: Dataset) -> None:
    resident = train(digits, epochs=2, augment=True)
    streamed = train(digits, epochs=2, augment=True, memory_limit=1)
    assert same(resident.model.state_dict(), streamed.model.state_dict())


class Poison(Defense):
    """Makes the loss infinite in given steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps, self.count = list(steps), 0

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
        self.count += 1
        return forward.clean().sum() * (torch.nan if self.count in self.steps else 0.0)


def test_a_loss_that_is_not_finite_goes_back_and_halves_the_rate(digits: Dataset) -> None:
    events: list[tuple[str, Mapping[str, Any]]] = []
    found = train(digits, [("poison", Poison([8]))], events=events, schedule=use("constant"))
    assert [flag.id for flag in found.flags] == ["diverged"]
    assert "halved" in found.flags[0].message
    assert len(found.epochs) == 3
    assert [round(getattr(row, "lr"), 6) for row in found.epochs] == [0.05, 0.025, 0.025]  # noqa: B009
    assert any(event == "guard" for event, _ in events)
    assert all(torch.isfinite(value).all() for value in found.model.state_dict().values())


class PoisonsWeights(Defense):
    """Makes the weights infinite after a given step, once."""

    def __init__(self, step: int) -> None:
        self.left = step

    def after_step(self, step: Step) -> None:
        self.left -= 1
        if not self.left:
            with torch.no_grad():
                next(step.model.parameters()).fill_(torch.nan)


def test_weights_that_the_last_step_of_an_epoch_spoils_are_not_kept(digits: Dataset) -> None:
    steps = -(-len(digits.train) // 64)
    found = train(digits, [("poisons", PoisonsWeights(2 * steps))])
    assert [flag.id for flag in found.flags] == ["diverged"]
    assert len(found.epochs) == 3
    assert all(torch.isfinite(value).all() for value in found.last_state.values())


def test_a_resume_knows_the_returns_there_were(digits: Dataset, tmp_path: Path) -> None:
    """Else it would go on at the full rate, and draw the same numbers again."""
    file = StateFile(tmp_path / "state", lambda message: None)
    given: dict[str, Any] = {"schedule": use("constant"), "augment": True}
    straight = train(digits, [("poison", Poison([8]))], **given)
    with pytest.raises(Stop):
        train(digits, [("poison", Poison([8]))], checkpoint=StopAfter(file, 2), **given)  # type: ignore[arg-type]
    resumed = train(digits, [("poison", Poison([]))], checkpoint=file, **given)
    rates = [round(getattr(row, "lr"), 6) for row in resumed.epochs]  # noqa: B009
    assert rates == [0.05, 0.025, 0.025]
    assert same(straight.model.state_dict(), resumed.model.state_dict())


def test_three_returns_are_enough(digits: Dataset) -> None:
    with pytest.raises(TrainingError, match=r"lower train\.optimizer's lr"):
        train(digits, [("poison", Poison(range(1, 100)))])


def test_weights_that_a_last_step_made_infinite_are_seen(digits: Dataset) -> None:
    given: dict[str, Any] = {"epochs": 1, "batch_size": 360, "schedule": use("constant")}
    with pytest.raises(TrainingError, match=r"validation loss not finite.*lower train\.optimizer's lr"):
        train(digits, optimizer=use("sgd", lr=1e30, momentum=0.0), **given)


class Constant0(nn.Module):
    """Predicts class 0 whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 10) + 0 * x.flatten(1)[:, :1]


def test_a_model_that_is_stuck_at_chance_starts_again_and_is_flagged(digits: Dataset) -> None:
    found = train(digits, model=Constant0(), epochs=4, optimizer=use("sgd", lr=1e-4, momentum=0.0))
    assert [flag.id for flag in found.flags] == ["stuck"] * 3
    assert found.flags[-1].severity == "wrong"
    assert "not trained" in found.flags[-1].message


class Firsts(Defense):
    """Writes down the weights that each attempt starts from."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        if step.progress == 0:
            self.seen.append(next(step.model.parameters()).detach().clone())
        return batch


def test_a_new_start_is_one_from_the_first_weights_at_a_tenth_of_the_rate(digits: Dataset) -> None:
    firsts = Firsts()
    given: dict[str, Any] = {"optimizer": use("sgd", lr=1e-4, momentum=0.0), "schedule": use("constant")}
    found = train(digits, [("firsts", firsts)], model=Constant0(), epochs=4, **given)
    assert len(firsts.seen) == 3
    assert not any(bool(weights.any()) for weights in firsts.seen)
    assert [getattr(row, "lr") for row in found.epochs] == pytest.approx([1e-6] * len(found.epochs))  # noqa: B009


@pytest.mark.parametrize("saves", [1, 2, 3, 4])
def test_a_training_that_was_killed_after_a_new_start_goes_on_bit_for_bit(
    saves: int, digits: Dataset, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"epochs": 4, "optimizer": use("sgd", lr=1e-4, momentum=0.9)}
    straight = train(digits, model=Constant0(), **given)
    file = StateFile(tmp_path / "state", lambda message: None)
    with pytest.raises(Stop):
        train(digits, model=Constant0(), checkpoint=StopAfter(file, saves), **given)  # type: ignore[arg-type]
    resumed = train(digits, model=Constant0(), checkpoint=file, **given)
    assert same(straight.last_state, resumed.last_state)
    assert [row.loss for row in straight.epochs] == [row.loss for row in resumed.epochs]


def row(epoch: int, robust: float, single: float, train_accuracy: float = 0.6) -> EpochRow:
    made = EpochRow(epoch=epoch, loss=1.0, train_accuracy=train_accuracy, clean=0.7, robust=robust)
    return made.model_copy(update={"single_step": single})


def test_the_rules_of_the_guards() -> None:
    guards = Guards(classes=10, epochs=10)
    healthy = [row(0, 0.30, 0.35), row(1, 0.36, 0.42)]
    assert guards.judge(row(2, 0.35, 0.44), healthy) == "ok"
    assert guards.judge(row(2, 0.05, 0.90), healthy) == "collapsed"
    assert guards.judge(row(2, 0.20, 0.25, train_accuracy=0.75), healthy) == "collapsed"
    assert guards.judge(row(2, 0.20, 0.25), healthy) == "ok", "weaker alone is no collapse"
    assert guards.judge(row(0, 0.0, 0.9), []) == "ok", "nothing to fall from"
    nan = row(1, 0.3, 0.3).model_copy(update={"loss": float("nan")})
    assert guards.judge(nan, healthy) == "diverged"
    held_out = row(1, 0.3, 0.3).model_copy(update={"validation_loss": float("inf")})
    assert guards.judge(held_out, healthy) == "diverged"
    chance = EpochRow(epoch=1, loss=2.3026, train_accuracy=0.1, clean=0.1)
    learning = EpochRow(epoch=1, loss=2.2, train_accuracy=0.15, clean=0.2)
    assert guards.judge(chance, [chance]) == "stuck"
    assert guards.judge(chance, [learning]) == "ok", "once may be chance"
    assert guards.judge(chance, []) == "ok"
    assert Guards(classes=10, epochs=2).judge(chance, []) == "stuck", "at the end it counts at once"
    assert Guards(classes=10, epochs=100).judge(chance, [chance]) == "ok", "too early to tell"
    assert guards.judge(learning, [chance]) == "ok"


def test_guards_can_be_switched_off(digits: Dataset) -> None:
    found = train(digits, model=Constant0(), guards=False, optimizer=use("sgd", lr=1e-4, momentum=0.0))
    assert found.flags == []
    assert len(found.epochs) == 3


def test_the_best_epoch_is_chosen_by_attacked_accuracy_where_a_defense_attacks(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    robust = [0.30, 0.50, 0.45, 0.50]
    clean = [0.2, 0.6, 0.9, 0.7]
    for select, expected in (("auto", 3), ("clean", 2), ("last", 3)):
        answers, cleans = iter([(value, value) for value in robust]), iter([(1.0, value) for value in clean])
        monkeypatch.setattr(
            "robustkit.train.loop.robust_accuracy", lambda *_, given=answers, **__: Attacked(*next(given))
        )
        monkeypatch.setattr("robustkit.train.loop.clean_loss_and_accuracy", lambda *_, given=cleans: next(given))
        assert train(digits, named(use("n_fgsm")), epochs=4, select=select).best_epoch == expected
    cleans = iter([(1.0, value) for value in clean])
    monkeypatch.setattr("robustkit.train.loop.clean_loss_and_accuracy", lambda *_: next(cleans))
    found = train(digits, epochs=4)
    assert found.best_epoch == 2
    assert not same(found.model.state_dict(), found.last_state), "best and last are both kept"


def test_select_robust_attacks_without_a_defense_that_does(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    found = train(digits, epochs=2, select="robust", threat=Threat("linf", 0.02))
    assert all(row.robust is not None for row in found.epochs)
    # A fall of this kind is catastrophic overfitting only where training attacks.
    answers = iter([(0.3, 0.4), (0.5, 0.6), (0.1, 0.9), (0.2, 0.9)])
    monkeypatch.setattr("robustkit.train.loop.robust_accuracy", lambda *_, **__: Attacked(*next(answers)))
    found = train(digits, epochs=4, select="robust")
    assert found.best_epoch == 1
    assert found.flags == []
    assert len(found.epochs) == 4


def test_no_epoch_is_chosen_before_the_schedule_is_done(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.9, 0.8, 0.5, 0.6])
    monkeypatch.setattr("robustkit.train.loop.clean_loss_and_accuracy", lambda *_: (1.0, next(accuracies)))
    found = train(digits, [("masks", keeper())], epochs=4)
    assert found.best_epoch == 3, "the best of those that are as sparse as asked"
    assert all(row.robust is None for row in found.epochs)


@pytest.mark.parametrize("method", [GlobalL1(0.8, "cubic", end=1.0), GlobalL1(0.8, "cubic", begin=1.0, end=1.0)])
def test_a_schedule_that_ends_with_the_training_is_done_by_then(method: GlobalL1, digits: Dataset) -> None:
    masks = MaskKeeper([method], inherit=False, context_seed=3, example=torch.zeros(2, 1, 8, 8), threat=THREAT)
    found = train(digits, [("masks", masks)], epochs=2)
    assert found.best_epoch == 1
    assert sparsity_of(found.model) == pytest.approx(0.8, abs=1e-3)


def test_the_test_data_are_never_looked_at(digits: Dataset) -> None:
    """Training on data whose test split is poisoned gives the same bits; monitored, it only adds two numbers."""
    poisoned = Dataset(
        digits.train, digits.validation, digits.test.select(torch.zeros(20, dtype=torch.int64)), digits.classes,
        digits.fingerprint, digits.mean, digits.std,
    )  # fmt: skip
    first = train(digits, named(use("n_fgsm"), use("deduplicate")))
    second = train(poisoned, named(use("n_fgsm"), use("deduplicate")))
    assert same(first.model.state_dict(), second.model.state_dict())
    watched = train(digits, named(use("n_fgsm"), use("deduplicate")), monitor_test=True)
    assert same(first.model.state_dict(), watched.model.state_dict())
    assert first.epochs[0].test_loss is None
    model = network()
    loss, accuracy = clean_loss_and_accuracy(watched.model, digits.test, CPU)
    assert watched.epochs[watched.best_epoch].test_loss == pytest.approx(loss, rel=1e-5)
    assert watched.epochs[watched.best_epoch].test_accuracy == pytest.approx(accuracy)
    logits = model(digits.validation.images.float() / 255)
    expected = nn.functional.cross_entropy(logits, digits.validation.labels).detach()
    assert clean_loss_and_accuracy(model.train(), digits.validation, CPU)[0] != pytest.approx(float(expected), rel=1e-3)
    assert model.training, "it was measured in eval mode and is back in training mode"


class Brightness(nn.Module):
    """Two classes split at a brightness of 0.5; a steep one saturates the probabilities."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        brightness = self.slope * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-brightness, brightness], 1)


def test_validation_attacks_are_those_that_are_described() -> None:
    """Ten margin steps get across the ball, through a saturated softmax too; one step of cross-entropy without."""
    levels = torch.tensor([90, 105, 150, 165]).to(torch.uint8)
    split = split_of(levels.view(4, 1, 1, 1).expand(4, 1, 8, 8).contiguous(), torch.tensor([0, 0, 1, 1]))
    threat = Threat("linf", 30 / 255)
    # 105 and 150 are within 30/255 of the border at 127.5; 90 and 165 are not.
    assert robust_accuracy(Brightness(10), split, threat, CPU, seed=0)[:2] == (0.5, 0.5)
    assert robust_accuracy(Brightness(1000), split, threat, CPU, seed=0)[:2] == (0.5, 1.0)


class Patient(Defense):
    """Stops after two epochs."""

    def after_epoch(self, report: EpochReport) -> Decision:
        return Decision.STOP if report.epoch == 1 else Decision.CONTINUE


class Reads(Defense):
    """Keeps the reports that it is given."""

    def __init__(self) -> None:
        self.reports: list[EpochReport] = []

    def after_epoch(self, report: EpochReport) -> Decision:
        self.reports.append(report)
        return Decision.CONTINUE


def test_a_defense_reads_what_the_epoch_measured(digits: Dataset) -> None:
    reads = Reads()
    found = train(digits, [*named(use("n_fgsm")), ("reads", reads)], epochs=2)
    expected = [(row.robust, getattr(row, "single_step")) for row in found.epochs]  # noqa: B009
    assert [(report.robust, report.single_step) for report in reads.reports] == expected
    assert all(one is not None for pair in expected for one in pair)


class GivesUp(Defense):
    def after_epoch(self, report: EpochReport) -> Decision:
        return Decision.FAIL


class Undoes(Defense):
    """Undoes the second epoch, as often as it is told."""

    def __init__(self, times: int) -> None:
        self.left = times

    def after_epoch(self, report: EpochReport) -> Decision:
        self.left -= report.epoch == 1
        return Decision.ROLLBACK if report.epoch == 1 and self.left >= 0 else Decision.CONTINUE


def test_a_defense_may_undo_an_epoch(digits: Dataset) -> None:
    plain = train(digits, [], schedule=use("constant"), epochs=3)
    fitted = train(digits, [("undoes", Undoes(1))], schedule=use("constant"), epochs=3)
    assert [row.epoch for row in fitted.epochs] == [0, 1, 2]
    assert fitted.epochs[0].loss == plain.epochs[0].loss
    rates = [getattr(row, "lr") for row in fitted.epochs]  # noqa: B009
    assert rates[1:] == [rates[0] / 2] * 2
    assert [flag.id for flag in fitted.flags] == ["rolled-back"]
    with pytest.raises(TrainingError, match="asked to undo epoch 2, after 3 returns"):
        train(digits, [("undoes", Undoes(9))], epochs=3)


def test_a_defense_may_stop_or_fail_a_training(digits: Dataset) -> None:
    assert len(train(digits, [("patient", Patient())], epochs=9).epochs) == 2
    with pytest.raises(TrainingError, match="gave up after epoch 1"):
        train(digits, [("gives-up", GivesUp())])


def test_a_stop_is_not_forgotten_on_resume(digits: Dataset, tmp_path: Path) -> None:
    file = StateFile(tmp_path / "state", lambda message: None)
    with pytest.raises(Stop):
        train(digits, [("patient", Patient())], epochs=9, checkpoint=StopAfter(file, 2))  # type: ignore[arg-type]
    assert len(train(digits, [("patient", Patient())], epochs=9, checkpoint=file).epochs) == 2


class Halves(Defense):
    """Leaves the first half of the training data out."""

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        return data.select(torch.arange(len(data) // 2, len(data)))


def test_sampling_weights_are_those_of_the_data_that_are_left(digits: Dataset) -> None:
    """In whichever order the recipe lists them."""
    first = train(digits, [*named(use("balanced_sampling")), ("halves", Halves())], epochs=1)
    second = train(digits, [("halves", Halves()), *named(use("balanced_sampling"))], epochs=1)
    assert same(first.model.state_dict(), second.model.state_dict())


def test_schedules() -> None:
    one = OneCycle(warm_up=0.25, start=0.1, final=0.0)
    assert [one.factor(share, 0) for share in (0, 0.25, 0.625, 1)] == pytest.approx([0.1, 1.0, 0.5, 0.0])
    assert [Cosine().factor(share, 0) for share in (0, 0.5, 1)] == pytest.approx([1.0, 0.5, 0.0])
    assert Cosine(warm_up=0.2).factor(0.1, 0) == pytest.approx(0.5)
    step = StepDecay(every=2, gamma=0.5)
    assert [step.factor(0, epoch) for epoch in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert Constant().factor(0.7, 3) == 1.0


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "step", "constant"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_with_every_schedule(optimizer: str, schedule: str, digits: Dataset) -> None:
    found = train(digits, optimizer=use(optimizer, lr=0.01), schedule=use(schedule), epochs=2)
    assert found.epochs[1].loss < found.epochs[0].loss


def test_channels_last_where_the_model_takes_it(digits: Dataset) -> None:
    taken, layout = to_channels_last(network(), (1, 8, 8), CPU)
    weight = taken.inner.groups[0].conv2.weight  # type: ignore[union-attr,index]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert layout == torch.channels_last

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 10)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.conv(x)
            logits: Tensor = self.head(maps.view(len(maps), -1))
            return logits

    model, layout = to_channels_last(Viewing(), (3, 8, 8), CPU)
    assert model.conv.weight.is_contiguous()  # type: ignore[operator,union-attr]
    assert layout == torch.contiguous_format
    splits = (digits.train, digits.validation, digits.test)
    colored = Dataset(
        *(split_of(one.images.repeat(1, 3, 1, 1), one.labels) for one in splits),
        digits.classes, digits.fingerprint, digits.mean * 3, digits.std * 3,
    )  # fmt: skip
    assert len(train(colored, named(use("n_fgsm")), model=Viewing(), epochs=1).epochs) == 1


def test_bf16(digits: Dataset) -> None:
    found = train(digits, named(use("n_fgsm")), precision="bf16", epochs=4, batch_size=16)
    assert found.epochs[-1].loss < found.epochs[0].loss
    assert all(value.dtype != torch.bfloat16 for value in found.model.state_dict().values())


def test_a_training_step_runs_on_the_meta_device() -> None:
    """A hidden `.item()`, or a tensor that was left on the CPU, raises there."""
    model = network().to("meta").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.empty(16, 1, 8, 8, device="meta")
    y = torch.empty(16, dtype=torch.int64, device="meta")
    loss, right = train_step(model, Batch(x, y, y, 10), [], optimizer, precision=None)
    assert loss.is_meta
    assert right.is_meta
    for one in (Crop(2), Flip(), Cutout(3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.randint", lambda *a, **k: torch.empty(16, 1, dtype=torch.int64, device="meta"))
            patch.setattr("torch.rand", lambda *a, **k: torch.empty(16, device="meta"))
            assert one(x, torch.Generator()).is_meta


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "attack", [Fgsm(), Fgsm("margin"), Pgd(steps=3), Pgd(steps=3, loss="ce", restarts=2), Noise(tries=2)]
)
def test_an_attack_step_runs_on_the_meta_device(attack: Any, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which examples are left is the one question an attack asks the device; here the answer is: all."""

    def everyone(robust: Tensor) -> Tensor:
        return torch.empty(len(robust), dtype=torch.int64, device="meta")

    for module in (active, search, __import__("robustkit.attacks.noise", fromlist=["noise"])):
        monkeypatch.setattr(module, "survivors", everyone)
    model = network().to("meta").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.empty(8, 1, 8, 8, device="meta")
    y = torch.empty(8, dtype=torch.int64, device="meta")
    found = attack(model, x, y, Threat(norm, 0.1), generator=torch.Generator())  # type: ignore[arg-type]
    assert found.is_meta
    assert found.shape == x.shape
