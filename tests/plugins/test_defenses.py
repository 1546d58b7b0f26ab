"""One table through which every defense goes: its step, gradients, ball, state, randomness and device."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robustkit import registry
from robustkit.api import run
from robustkit.attacks.threat import Threat
from robustkit.data.split import Dataset, Split, split_of
from robustkit.defenses.adversarial import PgdTraining
from robustkit.defenses.inner import cross_entropy_score, kl_score
from robustkit.errors import RecipeError, RobustkitError
from robustkit.recipe.schema import load_recipe, parse_recipe
from robustkit.recipe.spec import TrainSpec, Use
from robustkit.train.hooks import (
    Batch,
    DataContext,
    Defense,
    Forward,
    Step,
    is_adversarial,
    is_joined,
    is_taught,
    owned_hooks,
)
from robustkit.train.loop import fit
from robustkit.train.step import total_loss, train_step

RECIPES = Path(__file__).parents[2] / "recipes"
CUSTOM = RECIPES / "custom-defense"
EPS = 0.1


@dataclass(frozen=True)
class Case:
    """One defense with parameters; `ball` is how far x_adv may be from x, in multiples of eps."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "linf"
    ball: float | None = None
    owns: tuple[str, ...] = ()
    draws: bool = False
    """Whether its generator (or torch's, for a layer) has a say in the step."""
    at_once: bool = True
    """Whether its first images are perturbed already."""

    @property
    def id(self) -> str:
        return "-".join([self.name.rpartition(":")[2], self.norm, *map(str, self.parameters.values())])

    def make(self) -> Defense:
        entry = registry.find("defense", self.name, folder=CUSTOM)
        clean, problems = registry.check_parameters(entry, self.parameters)
        assert not problems
        defense = registry.create(entry, clean)
        assert isinstance(defense, Defense)
        if is_taught(defense):
            defense.take_teacher(network(seed=7))
        if is_joined(defense):
            defense.take_members([network(seed=8)])
        return defense


CASES = [
    Case("weight_decay", {"amount": "1e-3"}),
    Case("l1", {"amount": 1e-5}),
    Case("elastic", {"l1": 1e-5, "l2": 1e-4}),
    Case("orthogonal", {"amount": 1e-3}),
    Case("jacobian", {"projections": 2}, draws=True),
    Case("input_gradient"),
    Case("input_gradient", {"form": "squared"}, norm="l2"),
    Case("spectral_norm"),
    Case("max_norm", {"limit": 0.5}),
    Case("gradient_clipping", {"limit": 0.1}),
    Case("gradient_clipping", {"limit": 0.01, "by": "value"}),
    Case("logit_pairing"),
    Case("label_smoothing", {"amount": "10%"}),
    Case("dropout", {"p": 0.3}, draws=True),
    Case("dropout", {"p": 0.3, "conv": 0.1}, draws=True),
    Case("dropout2d", draws=True),
    Case("drop_block", {"p": "20%", "size": 2}, draws=True),
    Case("stochastic_depth", {"p": 0.5}, draws=True),
    Case("mixup", draws=True),
    Case("mixup", {"alpha": 1.0, "probability": 0.5}, draws=True),
    Case("cutmix", draws=True),
    Case("ema", owns=("evaluated_model",)),
    Case("swa", {"start": 0.5}, owns=("evaluated_model",)),
    Case("lookahead", {"k": 1}),
    Case("sam", owns=("second_pass",)),
    Case("balanced_sampling", owns=("sample_weights",)),
    Case("balanced_sampling", {"beta": 0.99}, owns=("sample_weights",)),
    Case("subsample"),
    Case("spectral_signatures"),
    Case("activation_clustering"),
    Case("hard_examples", {"warmup": 0.0}, owns=("loss_weights",)),
    Case("trimmed_loss", {"warmup": 0.0}, owns=("loss_weights",)),
    Case("partition_ensemble", {"parts": 2}, owns=("partition",)),
    Case("deduplicate"),
    Case("deduplicate", {"embedding": 0.999}),
    Case("knn_filter", {"k": 5, "features": "pixels"}),
    Case("knn_filter"),
    Case("pgd_training", {"steps": 2}, ball=1, owns=("perturb",), draws=True),
    Case("pgd_training", {"steps": 2, "restarts": 2, "loss": "margin"}, ball=1, owns=("perturb",), draws=True),
    Case("pgd_training", {"steps": 2, "random_start": False, "alpha": "16/255"}, ball=1, owns=("perturb",)),
    Case("pgd_training", {"steps": 2}, norm="l2", ball=1, owns=("perturb",), draws=True),
    Case("n_fgsm", ball=3, owns=("perturb",), draws=True),
    Case("n_fgsm", {"noise": 1.0, "alpha": 0.05}, ball=1.5, owns=("perturb",), draws=True),
    Case("fgsm", ball=1, owns=("perturb",)),
    Case("fgsm", norm="l2", ball=1, owns=("perturb",)),
    Case("fgsm_rs", ball=1, owns=("perturb",), draws=True),
    Case("free", {"replay": 3}, ball=1, owns=("perturb",), at_once=False),
    Case("free", {"replay": 2}, norm="l2", ball=1, owns=("perturb",), at_once=False),
    Case("ensemble_training", {"sources": 1, "epochs": 1}, ball=1, owns=("perturb", "objective"), draws=True),
    Case("mart", {"steps": 2}, ball=1, owns=("perturb", "objective"), draws=True),
    Case("mart", {"steps": 2}, norm="l2", ball=1, owns=("perturb", "objective"), draws=True),
    Case("awp"),
    Case("grad_align", draws=True),
    Case("grad_align", norm="l2", draws=True),
    Case("curriculum"),
    Case("curriculum", {"by": "accuracy"}),
    Case("trades", {"steps": 2}, ball=1, owns=("perturb", "objective"), draws=True),
    Case("trades", {"steps": 2, "beta": 1.0}, norm="l2", ball=1, owns=("perturb", "objective"), draws=True),
    Case("distill", owns=("objective",)),
    Case("distill", {"temperature": 1.0, "weight": 1.0}, owns=("objective",)),
    Case("ard", {"steps": 2}, ball=1, owns=("perturb", "objective"), draws=True),
    Case("ard", {"steps": 2, "weight": 0.5}, norm="l2", ball=1, owns=("perturb", "objective"), draws=True),
    Case("rslad", {"steps": 2}, ball=1, owns=("perturb", "objective"), draws=True),
    Case("rslad", {"steps": 2, "weight": 1.0}, norm="l2", ball=1, owns=("perturb", "objective"), draws=True),
    Case("jpeg", {"quality": 60}),
    Case("bit_depth", {"bits": 3}),
    Case("median_filter", {"size": 2}),
    Case("randomized_smoothing", {"sigma": 0.1, "samples": 2}),
    Case("mc_dropout", {"p": 0.3, "samples": 2}),
    Case("ensemble", {"members": ["other"]}),
    Case("input_gradient.py:InputGradient", {"weight": 0.5}),
    Case("input_gradient.py:InputGradient", {"weight": 0.5}, norm="l2"),
]
DATA = (
    "balanced_sampling", "deduplicate", "knn_filter", "subsample", "spectral_signatures", "activation_clustering"
)  # fmt: skip
"""Defenses that log what they did to the data."""
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
adversarial = pytest.mark.parametrize("case", [case for case in CASES if case.ball], ids=lambda case: case.id)


@pytest.fixture(scope="module")
def digits() -> Split:
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    return split_of(images[:300], torch.from_numpy(bunch.target)[:300])


class Residual(nn.Module):
    branch_end = "conv"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) / 4


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Residual(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def batch_of(data: Split, device: str = "cpu") -> Batch:
    moved = data.select(torch.arange(32)).to(torch.device(device))
    return Batch(moved.floats(0, 32), moved.labels, moved.index, 10)


def step_of(model: nn.Module, case: Case, seed: int = 0, device: str = "cpu") -> Step:
    generator = torch.Generator(device="cuda" if device == "cuda" else "cpu").manual_seed(seed)
    return Step(model, 0, 1, 0.5, Threat(case.norm, EPS), generator)  # type: ignore[arg-type]


def train(
    case: Case, data: Split, *, steps: int = 2, seed: int = 0, precision: torch.dtype | None = None, device: str = "cpu"
) -> tuple[nn.Module, list[Tensor]]:
    defense = case.make()
    model = defense.prepare_model(network().to(device)).train()
    groups = defense.parameter_groups([{"params": list(model.parameters())}], model)
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    step = step_of(model, case, seed, device)
    torch.manual_seed(seed)
    losses = [
        train_step(model, batch_of(data, device), [(defense, step)], optimizer, precision=precision)[0]
        for _ in range(steps)
    ]
    return model, losses


def test_every_built_in_defense_is_in_the_table() -> None:
    assert set(registry.BUILTIN["defense"]) <= {case.name for case in CASES}


def plain(name: str) -> str:
    """The name of a parameter without torch's parametrization around it."""
    return name.replace("parametrizations.", "").removesuffix(".original")


@every
def test_a_step_trains_and_leaves_the_model_as_it_was(case: Case, digits: Split) -> None:
    model, losses = train(case, digits)
    assert all(torch.isfinite(loss) for loss in losses)
    assert all(module.training for module in model.modules())
    fresh = dict(network().named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None, f"{name} got no gradient"
        assert torch.isfinite(parameter.grad).all()
        # The batch norm takes the mean off again, so that the bias before it has no gradient but rounding.
        assert name == "0.bias" or not torch.equal(parameter, fresh[plain(name)]), f"{name} did not move"
    restored = case.make().restore_model(model)
    assert list(restored.state_dict()) == list(network().state_dict())
    assert [name for name, _ in restored.named_modules()] == [name for name, _ in network().named_modules()]


@every
def test_the_same_generator_gives_the_same_step(case: Case, digits: Split) -> None:
    first, again, other = (train(case, digits, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) for name in first) != case.draws


@every
def test_state_goes_through_a_file(case: Case, digits: Split) -> None:
    defense, model = case.make(), network()
    batch, step = batch_of(digits), step_of(model, case)
    defense.perturb(defense.transform_batch(batch, step), step)
    defense.after_step(step)
    stream = io.BytesIO()
    torch.save(defense.state_dict(), stream)
    stream.seek(0)
    fresh = case.make()
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    torch.testing.assert_close(fresh.state_dict(), defense.state_dict(), rtol=0, atol=0)
    first, second = (one.perturb(batch, step_of(model, case, 5)) for one in (defense, fresh))
    assert (first is None and second is None) or torch.equal(first, second)  # type: ignore[arg-type]


@every
def test_a_step_runs_on_the_meta_device(case: Case, digits: Split) -> None:
    """A hidden `.item()`, or a tensor made on the CPU, raises there."""
    defense = case.make()
    model = defense.prepare_model(network().to("meta")).train()
    groups = defense.parameter_groups([{"params": list(model.parameters())}], model)
    batch, step = batch_of(digits), step_of(model, case)
    batch = replace(batch, x=batch.x.to("meta"), y=batch.y.to("meta"), index=batch.index.to("meta"))
    loss, right = train_step(model, batch, [(defense, step)], torch.optim.SGD(groups, lr=0.1), precision=None)
    assert loss.device.type == right.device.type == "meta"
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every
def test_a_step_runs_on_cuda(case: Case, digits: Split) -> None:
    model, losses = train(case, digits, precision=torch.bfloat16, device="cuda")
    assert all(loss.is_cuda and torch.isfinite(loss) for loss in losses)
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@every
def test_a_step_in_bf16_gives_every_parameter_a_gradient(case: Case, digits: Split) -> None:
    model, losses = train(case, digits, precision=torch.bfloat16)
    assert all(torch.isfinite(loss) for loss in losses)
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@every
def test_exclusive_hooks(case: Case) -> None:
    assert owned_hooks(type(case.make())) == tuple(hook for hook in case.owns)
    assert is_adversarial(case.make()) == ("perturb" in case.owns)


@adversarial
def test_perturbed_images_stay_in_ball_and_box_and_raise_the_loss(case: Case, digits: Split) -> None:
    # A few steps of training first: an untrained network has next to no gradient to follow.
    model = copy.deepcopy(train(case, digits, steps=10)[0]).eval()
    batch, defense = batch_of(digits), case.make()
    before = batch.x.clone()
    found = defense.perturb(batch, step_of(model, case))
    assert found is not None
    assert not found.requires_grad
    assert torch.equal(batch.x, before), "the clean images were changed in place"
    assert found.shape == batch.x.shape
    assert found.min() >= 0
    assert found.max() <= 1
    delta = (found - batch.x).flatten(1)
    size = delta.abs().amax(1) if case.norm == "linf" else delta.norm(dim=1)
    assert case.ball is not None
    assert (size <= case.ball * EPS + 1e-6).all()
    assert defense.budget(Threat(case.norm, EPS)) == pytest.approx(case.ball * EPS)  # type: ignore[arg-type]
    if not case.at_once:
        return
    assert (size > 0.3 * EPS).all(), "the budget is hardly used"
    score = kl_score(model(batch.x)) if "objective" in case.owns else cross_entropy_score(batch.y)
    assert (score(model(found)) > score(model(batch.x))).float().mean() > 0.9


# A defense that parts the data trains several models, each with a call of its own.
@pytest.mark.parametrize("case", [case for case in CASES if "partition" not in case.owns], ids=lambda case: case.id)
def test_an_epoch_of_the_training_loop(case: Case, digits: Split) -> None:
    data = Dataset(
        digits.select(torch.arange(200)),
        digits.select(torch.arange(200, 250)),
        digits.select(torch.arange(250, 300)),
        tuple(map(str, range(10))),
        "digits",
        (0.3,),
        (0.4,),
    )
    spec = TrainSpec(
        epochs=1,
        batch_size=50,
        optimizer=Use(name="sgd", parameters={"lr": 0.05, "momentum": 0.9}, label="sgd"),
        precision="fp32",
    )
    events: list[tuple[str, Mapping[str, Any]]] = []
    fitted = fit(
        network(),
        data,
        spec,
        [(case.name, case.make())],
        threat=Threat(case.norm, EPS),  # type: ignore[arg-type]
        seed=0,
        key="test",
        device=torch.device("cpu"),
        on_event=lambda name, values: events.append((name, values)),
    )
    assert len(fitted.epochs) == 1
    assert (fitted.epochs[0].robust is not None) == ("perturb" in case.owns)
    assert list(fitted.model.state_dict()) == list(network().state_dict())
    if case.name in DATA:
        assert any(case.name in str(values.get("message")) for name, values in events if name == "data")


def test_defenses_compose_in_one_step(digits: Split) -> None:
    cases = [
        Case("label_smoothing"),
        Case("dropout", {"p": 0.2}),
        Case("weight_decay"),
        Case("l1", {"amount": 0.01}),
        Case("trades", {"steps": 1}),
        Case("input_gradient.py:InputGradient"),
    ]
    defenses = [case.make() for case in cases]
    model = network()
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    for defense in defenses:
        model = defense.prepare_model(model)
        groups = defense.parameter_groups(groups, model)
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    hooked = [(defense, step_of(model, case)) for defense, case in zip(defenses, cases, strict=True)]
    batch = batch_of(digits)
    train_step(model, batch, hooked, torch.optim.SGD(groups, lr=0.1), precision=None)
    model.eval()
    batch = defenses[0].transform_batch(batch, hooked[0][1])
    batch.x_adv = batch.x
    alone = total_loss(batch, Forward(model, batch), hooked[:1])
    penalties = [defense.penalty(batch, Forward(model, batch), step) for defense, step in hooked]
    added = sum((penalty for penalty in penalties if penalty is not None), torch.zeros(()))
    assert sum(penalty is not None for penalty in penalties) == 2
    torch.testing.assert_close(total_loss(batch, Forward(model, batch), hooked), alone + added)


@pytest.mark.parametrize(
    ("pair", "hook"),
    [
        ("[pgd_training, trades]", "perturb"),
        ("[n_fgsm, pgd_training]", "perturb"),
        ("[hard_examples, trimmed_loss]", "loss_weights"),
        ("[swa, ema]", "evaluated_model"),
    ],
)
def test_two_owners_of_one_hook_are_a_recipe_error(pair: str, hook: str) -> None:
    text = f"name: x\ndata: digits\nmodel: small_cnn\nvariants:\n  both: {{defenses: {pair}}}\n"
    with pytest.raises(RecipeError, match=hook):
        parse_recipe(text)


def test_two_second_passes_are_a_recipe_error() -> None:
    text = "name: x\ndata: digits\nmodel: small_cnn\nvariants: {a: {defenses: [sam, sam: {rho: 0.1, as: other}]}}\n"
    with pytest.raises(RecipeError, match="both own `second_pass`"):
        parse_recipe(text)


HEIRS = {
    "from robustkit.defenses.adversarial import PgdTraining": "PgdTraining",
    "from robustkit.defenses.adversarial import PgdTraining as Base\nclass Between(Base): pass": "Between",
    "from robustkit.defenses import adversarial": "adversarial.PgdTraining",
    "import robustkit.defenses.adversarial": "robustkit.defenses.adversarial.PgdTraining",
    "import robustkit.defenses.adversarial as there": "there.PgdTraining",
    "from robustkit.defenses.adversarial import PgdTraining as Mine": "Mine",
    "from helpers.base import Base": "Base",
    "from robustkit import Defense\nclass Base(Defense):\n    def perturb(self, batch, step): ...": "Base",
    "from robustkit import Defense\nclass Mixin:\n    perturb = print": "Mixin, Defense",
}


@pytest.fixture
def heirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "helpers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "base.py").write_text("from .far import Far\nclass Base(Far): pass\n")
    (package / "far.py").write_text("from robustkit.defenses.adversarial import NFgsm\nclass Far(NFgsm): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def pair_of(name: str) -> str:
    data = "{digits: {limit: 100}}"
    return f"name: x\ndata: {data}\nmodel: small_cnn\nvariants: {{a: {{defenses: [{name}, n_fgsm]}}}}\n"


@pytest.mark.parametrize("before", HEIRS)
def test_a_hook_that_is_inherited_has_an_owner_too(before: str, heirs: Path) -> None:
    (heirs / "mine.py").write_text(f"{before}\nraise SystemExit\nclass Mine({HEIRS[before]}): pass\n")
    text = pair_of("'mine.py:Mine'")
    with pytest.raises(RecipeError, match="both own `perturb`"):
        parse_recipe(text, folder=heirs)
    with pytest.raises(RecipeError, match="both own `perturb`"):
        parse_recipe(text.replace("'mine.py:Mine'", "Mine") + "plugins: [mine.py]\n", folder=heirs)


def test_a_class_without_the_hook_owns_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import robustkit\nfrom robustkit import Defense\nclass Base(Defense): pass\nclass Mine(Base, Defense): pass\n"
        "class Round(Round): pass\nclass Other(robustkit.Defense, no.such.Thing, made()): pass\n"
        "class Mixin:\n    def perturb(self, batch, step): ...\nclass Behind(Base, Mixin): pass\n"
    )
    for name in ("Mine", "Round", "Other", "Behind"):
        assert parse_recipe(pair_of(f"'mine.py:{name}'"), folder=tmp_path).variants


def test_a_registered_class_owns_what_it_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", registry.Registered())

    @registry.register("defense")
    class Heir(PgdTraining):
        """Heir."""

    assert owned_hooks(Heir) == ("perturb",)
    with pytest.raises(RecipeError, match="both own `perturb`"):
        parse_recipe(pair_of("heir"))


def test_two_owners_that_no_source_shows_fail_before_training(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from robustkit.defenses.adversarial import PgdTraining\ndef made(): return PgdTraining\n"
        "class Mine(made()): 'Mine.'\n"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(pair_of("'mine.py:Mine'"))
    with pytest.raises(RobustkitError, match=r"mine\.py:Mine and n_fgsm both own `perturb`"):
        run(path, runs=tmp_path / "runs")


def test_the_custom_defense_is_reached_from_its_recipe(digits: Split) -> None:
    recipe = load_recipe(CUSTOM / "recipe.yaml")
    use = recipe.variant("input-gradient").defenses[0]
    entry = registry.find("defense", use.name, folder=recipe.folder, plugins=recipe.plugins)
    assert registry.runs_user_code(entry)
    defense = registry.create(entry, use.parameters)
    # Of a linear model the gradient of the cross-entropy is (softmax - one-hot) W.
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    batch = batch_of(digits)
    weight = model[1].weight
    assert isinstance(weight, Tensor)
    by_hand = (model(batch.x).softmax(1) - batch.soft_target()) @ weight
    for norm, order in (("linf", 1), ("l2", 2)):
        penalty = defense.penalty(batch, None, step_of(model, Case(use.name, norm=norm)))
        torch.testing.assert_close(penalty, EPS * by_hand.norm(p=order, dim=1).mean())


def test_data_defenses_keep_labels_beside_their_images(digits: Split) -> None:
    context = DataContext(
        generator=torch.Generator(),
        device=torch.device("cpu"),
        log=lambda message, numbers: None,
        features=lambda split: split.floats(0, len(split)).flatten(1),
    )
    twice = split_of(digits.images.repeat(2, 1, 1, 1), digits.labels.repeat(2))
    cases = [case for case in CASES if case.name in DATA and not case.owns]
    assert len(cases) == 7
    for case in cases:
        kept = case.make().prepare_data(twice, context)
        assert 0 < len(kept) < len(twice) or case.name in ("knn_filter", "activation_clustering")
        assert torch.equal(kept.images, twice.images[kept.index])
        assert torch.equal(kept.labels, twice.labels[kept.index])
        assert set(kept.labels.tolist()) == set(twice.labels.tolist())
