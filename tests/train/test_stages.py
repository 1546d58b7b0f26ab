"""Stages: each epoch takes its own values, frozen layers keep still, a resumed training gives the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.checkpoint import StateFile
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset
from robustkit.errors import ModelError, RecipeError, TrainingError
from robustkit.models.baseline_cnn import BaselineCnn
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import StageSpec, TrainSpec, Use
from robustkit.train.hooks import Batch, Defense, Step
from robustkit.train.loop import Fitted, fit
from robustkit.train.stages import resized

CPU = torch.device("cpu")
STAGES = (
    StageSpec(epochs=1, lr=0.5, eps=0.0, resolution=6, batch_size=100),
    StageSpec(epochs=2, eps=0.5, freeze=("groups.0",)),
    StageSpec(epochs=1),
)


class Watch(Defense):
    """Notes what each step is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, float]] = []

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        self.seen.append((step.epoch, len(batch.x), batch.x.shape[-1], round(step.threat.eps, 4)))
        return batch


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(Use(name="digits", parameters={"limit": 300}, label="d"), cache=tmp_path_factory.mktemp("c"))


def network() -> Normalized:
    torch.manual_seed(0)
    return Normalized(SmallCnn((1, 8, 8), 10, [4, 8]), [0.3], [0.4])


def train(data: Dataset, stages: tuple[StageSpec, ...], model: Any = None, **more: Any) -> Fitted:
    spec = TrainSpec(epochs=sum(one.epochs for one in stages), batch_size=50, stages=stages)
    given = more.pop("defenses", [("n_fgsm", registry.create(registry.find("defense", "n_fgsm"), {}))])
    threat = Threat("linf", 0.1)
    more = {"on_event": lambda *_: None, **more}
    return fit(model or network(), data, spec, given, threat=threat, seed=0, key="k", device=CPU, **more)


def test_every_step_has_its_stage_values(digits: Dataset) -> None:
    watch = Watch()
    fitted = train(digits, STAGES, defenses=[("watch", watch)])
    sizes = {(epoch, side, eps) for epoch, _, side, eps in watch.seen}
    assert sizes == {(0, 6, 0.0), (1, 8, 0.05), (2, 8, 0.05), (3, 8, 0.1)}
    assert max(size for epoch, size, *_ in watch.seen if epoch == 0) == 100
    assert max(size for epoch, size, *_ in watch.seen if epoch > 0) == 50
    assert fitted.best_epoch == 3


def test_frozen_layers_keep_weights_and_statistics(digits: Dataset) -> None:
    before = copy.deepcopy(network().state_dict())
    fitted = train(digits, (StageSpec(epochs=1, freeze=("groups.0", "head.bias")),))
    after = fitted.model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("inner.groups.0.")} | {
        "inner.head.bias",
        *(name for name, _ in network().named_buffers() if name in ("mean", "std")),
    }
    assert all(one.requires_grad for one in fitted.model.parameters())


def test_an_average_leaves_the_statistics_of_frozen_layers(digits: Dataset) -> None:
    swa = registry.create(registry.find("defense", "swa"), {"start": 0.2})
    fitted = train(digits, (StageSpec(epochs=3, freeze=("groups.0",)),), defenses=[("swa", swa)])
    before, after = network().state_dict(), fitted.last_state
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("inner.groups.0.")} <= same
    assert "inner.groups.1.norm1.running_mean" not in same


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_layers_are_unfrozen_again(optimizer: str, digits: Dataset) -> None:
    names = [name for name, _ in network().named_parameters() if name.startswith("inner.groups.0.")]
    before = network().state_dict()
    spec = TrainSpec(
        epochs=2,
        batch_size=50,
        optimizer=Use(name=optimizer, parameters={"lr": 0.01}, label=optimizer),
        stages=(StageSpec(epochs=1, freeze=("groups.0",)), StageSpec(epochs=1)),
    )
    given: dict[str, Any] = {"threat": Threat("linf", 0.1), "seed": 0, "key": "k", "device": CPU}
    after = fit(network(), digits, spec, [], on_event=lambda *_: None, **given).last_state
    assert names
    assert not any(torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize(
    ("name", "parameters", "first"), [("max_norm", {"limit": 0.1}, "groups.0"), ("lookahead", {"k": 4}, "groups.1")]
)
def test_what_moves_weights_by_itself_leaves_frozen_layers(
    name: str, parameters: dict[str, Any], first: str, digits: Dataset
) -> None:
    kept: list[torch.Tensor] = []

    class Note(Defense):
        def transform_batch(self, batch: Batch, step: Step) -> Batch:
            if step.epoch == 1 and not kept:
                kept.append(step.model.get_parameter("inner.groups.0.conv1.weight").detach().clone())
            return batch

    stages = (StageSpec(epochs=1, freeze=(first,)), StageSpec(epochs=1, freeze=("groups.0",)))
    defense = registry.create(registry.find("defense", name), parameters)
    fitted = train(digits, stages, defenses=[(name, defense), ("note", Note())])
    found = fitted.last_state["inner.groups.0.conv1.weight"]
    assert torch.equal(found, kept[0])
    assert name == "lookahead" or torch.equal(found, network().state_dict()["inner.groups.0.conv1.weight"])
    assert name == "max_norm" or not torch.equal(found, network().state_dict()["inner.groups.0.conv1.weight"])


def test_resume_in_the_middle_of_a_stage_gives_the_same_numbers(digits: Dataset, tmp_path: Path) -> None:
    whole = train(digits, STAGES)

    def stop(kind: str, values: Any) -> None:
        if kind == "epoch" and values["epoch"] == 2:
            raise KeyboardInterrupt

    file = StateFile(tmp_path / "state", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        train(digits, STAGES, checkpoint=file, on_event=stop)
    resumed = train(digits, STAGES, checkpoint=file)
    assert [row.loss for row in resumed.epochs] == [row.loss for row in whole.epochs]
    assert all(torch.equal(value, resumed.last_state[name]) for name, value in whole.last_state.items())


def test_resized_keeps_constant_images_and_their_range() -> None:
    assert torch.allclose(resized(torch.full((2, 1, 8, 8), 0.25), 5), torch.full((2, 1, 5, 5), 0.25))
    x = torch.rand(2, 1, 8, 8)
    assert resized(x, None) is x
    assert resized(x, 8) is x


@pytest.mark.parametrize(
    ("freeze", "words"), [(("nose",), "no layer 'nose' to freeze"), (("groups", "head"), "every layer is frozen")]
)
def test_layers_that_cannot_be_frozen(digits: Dataset, freeze: tuple[str, ...], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        train(digits, (StageSpec(epochs=1, freeze=freeze),))


def test_a_model_that_takes_one_resolution_only(digits: Dataset) -> None:
    model = BaselineCnn((1, 16, 16), 10)
    with pytest.raises(ModelError, match="stage 1: the model does not take images of 20x20"):
        train(digits, (StageSpec(epochs=1, resolution=20),), model)


def parsed(train: str) -> Any:
    return parse_recipe(
        f"data: digits\nmodel: small_cnn\ntrain: {train}\nvariants:\n  a:\n  b: {{train: {{epochs: 7}}}}\n"
    )


def test_stages_of_a_recipe() -> None:
    recipe = parsed("{stages: [{epochs: 2, eps: 50%}, {epochs: 3, freeze: [head]}]}")
    spec = recipe.variant("a").train
    assert spec.epochs == 5
    assert [stage.eps for stage in spec.stages] == [0.5, 1.0]
    assert recipe.variant("b").train.stages == ()
    assert recipe.variant("b").train.epochs == 7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{stages: [{epochs: 2, epz: 1}]}", "unknown key 'epz'"),
        ("{stages: [{eps: 50%}]}", "epochs"),
        ("{stages: [{epochs: 1, eps: 2}]}", "eps"),
        ("{stages: []}", "stages are a list"),
        ("{epochs: 4, stages: [{epochs: 1}]}", "1 epochs together, but `epochs` is 4"),
    ],
)
def test_mistakes_in_stages_have_a_place(given: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parsed(given)
    assert words in str(caught.value)
    assert ":3:" in str(caught.value)
