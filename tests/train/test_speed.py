"""What makes training quicker or smaller, and changes no number: pieces, blocks computed again, fused updates, auto."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.checkpoint import StateFile
from robustkit.compress.costs import count_macs
from robustkit.data.augment import Crop, Flip
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset
from robustkit.errors import RecipeError, TrainingError, UsageError
from robustkit.models.build import build_model
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn
from robustkit.precision import has_bf16
from robustkit.recipe.plan import make_plan
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import TrainSpec, Use
from robustkit.train import engine as engines
from robustkit.train.checkpointing import blocks_of, checkpointed
from robustkit.train.determinism import WORKSPACE, deterministic
from robustkit.train.engine import LEAST_MACS, TrainingEngine, batch_macs, candidates, choose, worth_bf16
from robustkit.train.hooks import Batch, Defense, Step
from robustkit.train.loop import Fitted, fit
from robustkit.train.optim import Adam, AdamW, Sgd
from robustkit.train.pieces import pieces
from robustkit.train.step import train_step

CPU = torch.device("cpu")
THREAT = Threat("linf", 0.1)


def use(name: str, **parameters: Any) -> Use:
    return Use(name=name, parameters=parameters, label=name)


def defense(name: str, **parameters: Any) -> Defense:
    made = registry.create(registry.find("defense", name), parameters)
    assert isinstance(made, Defense)
    return made


def plain_network() -> nn.Module:
    """Without batch norm, whose statistics are those of the pieces."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers).double()


def one_step(
    model: nn.Module, defenses: list[Defense], *, accumulate: int = 1, weighted: bool = False, count: int = 10
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients, loss and right predictions of one step."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=dtype)
    y = torch.randint(10, (count,), generator=generator)
    weight = torch.rand(count, generator=generator, dtype=dtype) if weighted else None
    batch = Batch(x, y, torch.arange(count), 10, weight=weight)
    step = Step(model, 0, 1, 0.5, THREAT, generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hooked = [(one, step) for one in defenses]
    loss, right = train_step(model, batch, hooked, optimizer, precision=None, accumulate=accumulate)
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, loss, right


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulate", [3, 64])
@pytest.mark.parametrize(
    "made",
    [
        lambda: [],
        lambda: [defense("fgsm"), defense("label_smoothing", amount=0.1), defense("l1", amount=0.01)],
        lambda: [defense("mart", steps=2)],
    ],
    ids=["plain", "fgsm, smoothing, l1", "mart"],
)
def test_pieces_have_the_gradient_of_the_whole_batch(
    made: Callable[[], list[Defense]], accumulate: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From the image itself: a random start would be drawn piece by piece.
    monkeypatch.setattr("robustkit.defenses.inner.random_start", lambda x, threat, generator: x)
    wanted = one_step(plain_network(), made(), weighted=weighted)
    found = one_step(plain_network(), made(), accumulate=accumulate, weighted=weighted)
    for name, gradient in wanted[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=1e-8)
    # The losses are computed in float32.
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)
    assert int(found[2]) == int(wanted[2])


@pytest.mark.parametrize(("count", "accumulate"), [(10, 3), (5, 4), (9, 2), (21, 6), (64, 7), (2, 4), (1, 3)])
def test_no_piece_is_a_single_image_unless_the_batch_is(count: int, accumulate: int) -> None:
    batch = Batch(torch.rand(count, 1, 2, 2), torch.arange(count), torch.arange(count), count)
    parts = pieces(batch, accumulate)
    assert torch.equal(torch.cat([one.index for one, _ in parts]), batch.index)
    assert len(parts) <= accumulate
    assert min(len(one.y) for one, _ in parts) >= min(2, count)
    assert sum(float(share) for _, share in parts) == pytest.approx(1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(use("digits", limit=200), cache=tmp_path_factory.mktemp("cache"))


def network() -> Normalized:
    torch.manual_seed(0)
    return Normalized(SmallCnn((1, 8, 8), 10, [8, 16]), [0.3], [0.4])


def train(
    data: Dataset, *names: str, checkpoint: StateFile | None = None, choices: Path | None = None, **spec: Any
) -> Fitted:
    values: dict[str, Any] = {"epochs": 2, "batch_size": 60, "optimizer": use("sgd", lr=0.05), **spec}
    augment = [Crop(1), Flip(alternate=True)]
    return fit(
        network(),
        data,
        TrainSpec(**values),
        [(name, defense(name)) for name in names],
        threat=THREAT,
        seed=0,
        key="test",
        device=CPU,
        on_event=lambda *_: None,
        choices=choices,
        augment=augment,
        checkpoint=checkpoint,
    )


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_seed_gives_the_same_bits(digits: Dataset) -> None:
    given: dict[str, Any] = {"accumulate": 3, "deterministic": True}
    first, second = (train(digits, "n_fgsm", "dropout", **given) for _ in range(2))
    assert same(first.last_state, second.last_state)
    assert not same(first.last_state, train(digits, "n_fgsm", "dropout", deterministic=True).last_state)


@pytest.mark.parametrize(
    "names",
    [
        # Masks have to be drawn again, and batch norms are to count each batch once.
        ("n_fgsm", "dropout", "ema"),
        # Its vectors move on in each forward, and there are two before the backward.
        ("spectral_norm", "trades"),
        # Gradients of gradients: in eval mode, which is over before the backward, and in train mode.
        ("fgsm", "grad_align", "jacobian"),
    ],
)
def test_blocks_computed_again_change_no_bit(names: tuple[str, ...], digits: Dataset) -> None:
    first = train(digits, *names)
    second = train(digits, *names, checkpointing=True)
    assert same(first.last_state, second.last_state)


@pytest.mark.parametrize("name", ["hard_examples", "trimmed_loss", "sam", "free"])
def test_what_needs_the_whole_batch_is_refused_in_pieces(name: str, digits: Dataset) -> None:
    with pytest.raises(UsageError, match=r"accumulate.*whole batch"):
        train(digits, name, accumulate=2)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with saved_tensors_hooks(note, lambda value: value):
        loss = run()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "wide_resnet", "torchvision.mobilenet_v2"])
def test_blocks_computed_again_have_equal_gradients_and_keep_less(name: str) -> None:
    small: dict[str, dict[str, Any]] = {"small_cnn": {"widths": [8, 8, 8]}, "wide_resnet": {"depth": 10, "width": 1}}
    torch.manual_seed(0)
    parameters = small.get(name, {})
    model = build_model(use(name, **parameters), shape=(3, 32, 32), classes=10, mean=[0.5] * 3, std=[0.5] * 3).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = blocks_of(model)
    assert len(blocks) >= 2
    x = torch.rand(4, 3, 32, 32)
    found: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []
    for chosen in ([], blocks):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(1)
        with checkpointed(model, chosen):
            kept = saved_bytes(lambda: model(x).square().sum())
            model.load_state_dict(state)
            torch.manual_seed(1)
            model(x).square().sum().backward()
        gradients = {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}
        found.append((kept, gradients, {key: value.clone() for key, value in model.state_dict().items()}))
    (plain, gradients, buffers), (less, again, after) = found
    assert same(gradients, again)
    assert same(buffers, after)
    assert less < 0.6 * plain, (less, plain)
    assert all("forward" not in vars(block) for block in blocks)


def test_a_model_without_blocks_is_refused(digits: Dataset) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(x.flatten(1))
            return logits

    spec = TrainSpec(epochs=1, checkpointing=True)
    with pytest.raises(UsageError, match="chain of blocks"):
        fit(Flat(), digits, spec, [], threat=THREAT, seed=0, key="k", device=CPU, on_event=lambda *_: None)
    with pytest.raises(UsageError, match="compile"):
        train(digits, checkpointing=True, compile="auto")


def settings() -> tuple[bool, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns, cudnn.deterministic, cudnn.benchmark


def test_deterministic_algorithms_are_for_the_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    with deterministic(True, CPU):
        assert settings() == (True, False, True, False)
    with deterministic(False, CPU):
        assert settings() == before
    # put_ is one of the operations for which torch has no deterministic form.
    with pytest.raises(TrainingError, match=r"deterministic: true: put_"), deterministic(True, CPU):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2), accumulate=False)
    assert settings() == before
    monkeypatch.delenv(WORKSPACE, raising=False)
    with pytest.raises(UsageError, match=WORKSPACE), deterministic(True, torch.device("cuda")):
        pass


@pytest.mark.parametrize("plugin", [Sgd(0.1, weight_decay=0.01, nesterov=True), Adam(0.01), AdamW(0.01)])
def test_a_fused_update_is_the_usual_one(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("robustkit.train.optim.fusible", lambda groups: False)
        model = plain_network()
        optimizer = plugin.build([{"params": list(model.parameters())}])
        assert bool(optimizer.defaults["fused"]) is fused
        for number in range(3):
            for one in model.parameters():
                one.grad = torch.full_like(one, 0.1 * number).add_(one.detach(), alpha=0.5)
            optimizer.step()
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-12)


def test_parameters_on_an_unknown_device_are_not_fused() -> None:
    assert not Sgd().build([{"params": [nn.Parameter(torch.zeros(2, device="meta"))]}]).defaults["fused"]


class Clock:
    """A clock that moves only in forwards, also in those of a model's copies."""

    now = 0.0

    def __deepcopy__(self, memo: object) -> Clock:
        return self

    def perf_counter(self) -> float:
        return self.now


class Compiled:
    """Stands for torch.compile: takes so long in each forward, or fails."""

    def __init__(self, seconds: float = 0.0, fails: bool = False) -> None:
        self.seconds, self.fails, self.count = seconds, fails, 0
        self.clock = Clock()

    def __call__(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        self.count += 1

        def run(x: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError("no compiler found\nlong trace")
            self.clock.now += self.seconds
            logits: Tensor = model.inner(x)  # type: ignore[operator, union-attr, assignment]
            return logits

        return run


class Slow(nn.Module):
    """Takes 30 ms for a forward that is not compiled."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 0.03
        logits: Tensor = self.inner(x)
        return logits


def choice(monkeypatch: pytest.MonkeyPatch, compiled: Compiled, folder: Path | None = None) -> TrainingEngine:
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(engines, "time", compiled.clock)
    monkeypatch.setattr(engines, "has_bf16", lambda device: False)
    return choose(TrainSpec(compile="auto"), Slow(compiled.clock), torch.rand(4, 1, 8, 8), CPU, folder, 10)


def test_auto_takes_what_measures_faster_and_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = choice(monkeypatch, Compiled(0.02))
    assert (quick.name, quick.precision) == ("fp32 compiled", None)
    assert quick.seconds == pytest.approx({"fp32": 0.03, "fp32 compiled": 0.02})
    wanted = "trained in fp32 compiled; a forward and backward measured: fp32 30.0 ms, fp32 compiled 20.0 ms"
    assert quick.note() == wanted
    assert not choice(monkeypatch, Compiled(0.06)).compiled
    assert not choice(monkeypatch, Compiled(0.028)).compiled, "a clock's noise must not decide"
    failed = choice(monkeypatch, Compiled(fails=True))
    assert (failed.compiled, list(failed.seconds)) == (False, ["fp32"])
    with pytest.raises(TrainingError, match=r"torch.compile fails here: no compiler found; use compile: auto"):
        choose(TrainSpec(compile=True), Slow(Clock()), torch.rand(4, 1, 8, 8), CPU, None, 10)


def test_a_repeated_training_stays_with_its_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = choice(monkeypatch, Compiled(), tmp_path)
    unused = Compiled(0.06)
    assert choice(monkeypatch, unused, tmp_path) == first
    assert unused.count == 0
    (file,) = tmp_path.iterdir()
    file.write_text('{"bf16": "yes"}')
    assert not choice(monkeypatch, unused, tmp_path).compiled


def test_a_resumed_training_stays_with_its_choice(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[TrainingEngine] = []

    def chosen(*_: Any) -> TrainingEngine:
        made.append(TrainingEngine(seconds={"fp32": 0.5, "fp32 compiled": 0.6}))
        return made[-1]

    monkeypatch.setattr("robustkit.train.loop.choose", chosen)
    file = StateFile(tmp_path / "state", lambda message: None)
    first = train(digits, epochs=1, checkpoint=file)
    again = train(digits, epochs=1, checkpoint=file)
    assert len(made) == 1
    assert again.notes == first.notes
    assert first.notes == ["trained in fp32; a forward and backward measured: fp32 500.0 ms, fp32 compiled 600.0 ms"]


def test_a_trial_leaves_the_model_and_the_generator_alone() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    assert engines._Trial(TrainingEngine(bf16=True), model, torch.rand(4, 1, 8, 8), 10).step() is None
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), wanted)
    assert same(before, model.state_dict())
    assert all(one.grad is None for one in model.parameters())


def test_the_ways_that_a_training_may_take() -> None:
    def names(lower: bool = False, **train: Any) -> list[str]:
        return [one.name for one in candidates(TrainSpec(**train), lower)]

    assert names() == ["fp32"]
    assert names(lower=True) == ["fp32", "bf16"]
    assert names(lower=True, precision="fp32") == ["fp32"]
    assert names(precision="bf16", compile="auto") == ["bf16", "bf16 compiled"]
    assert names(compile=True) == ["fp32 compiled"]


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_bfloat16_is_tried_on_processors_that_multiply_in_it(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], wanted: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert has_bf16(CPU) is wanted
    assert not has_bf16(torch.device("meta"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_bf16(CPU), "torch 2.10 does not say"


def test_small_models_are_not_tried_in_bfloat16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SmallCnn((1, 28, 28), 10, [16, 32]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(128, 1, 28, 28)
    assert batch_macs(model, x) == 128 * count_macs(model.eval(), (1, 28, 28)) > LEAST_MACS
    assert same(before, model.state_dict())
    monkeypatch.setattr(engines, "has_bf16", lambda device: True)
    assert worth_bf16(model, x)
    assert not worth_bf16(model, x[:64])
    assert not worth_bf16(model, x[:, :, :2]), "it fails, which the training says"
    monkeypatch.setattr(engines, "has_bf16", lambda device: False)
    assert not worth_bf16(model, x)


class Lower(nn.Module):
    """As slow as told in bfloat16, 30 ms in float32."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        self.clock.now += 0.03 if logits.dtype == torch.float32 else self.seconds
        return logits


@pytest.mark.parametrize(("seconds", "wanted"), [(0.02, "bf16"), (0.028, "fp32"), (0.04, "fp32")])
def test_auto_takes_bfloat16_on_a_cpu_where_it_measures_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: float, wanted: str
) -> None:
    clock = Clock()
    monkeypatch.setattr(engines, "time", clock)
    monkeypatch.setattr(engines, "worth_bf16", lambda model, x: True)
    found = choose(TrainSpec(), Lower(clock, seconds), torch.rand(4, 1, 8, 8), CPU, None, 10)
    assert found.name == wanted
    assert found.seconds == pytest.approx({"fp32": 0.03, "bf16": seconds})


@pytest.mark.parametrize(("seconds", "steps"), [(6.0, 1), (2.0, 3), (1.0, 3), (0.2, 5), (0.02, 10)])
def test_a_trial_takes_more_rounds_the_shorter_they_are(
    monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int
) -> None:
    compiled = Compiled(seconds)
    choice(monkeypatch, compiled)
    assert compiled.clock.now == pytest.approx((engines.WARM + steps) * (0.03 + seconds))


def test_a_training_in_bfloat16_on_a_cpu_is_repeated_to_the_bit(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second training finds the first one's choice, whatever the clock would say now."""
    monkeypatch.setattr(engines, "worth_bf16", lambda model, x: True)
    monkeypatch.setattr(engines, "_tried", lambda ways, *_: replace(ways[-1], seconds={"fp32": 0.03, "bf16": 0.02}))
    first = train(digits, "n_fgsm", epochs=2, choices=tmp_path)
    monkeypatch.setattr(engines, "_tried", lambda ways, *_: ways[0])
    again = train(digits, "n_fgsm", epochs=2, choices=tmp_path)
    usual = train(digits, "n_fgsm", epochs=2, precision="fp32")
    assert first.notes[0] == "trained in bf16; a forward and backward measured: fp32 30.0 ms, bf16 20.0 ms"
    assert again.notes == first.notes
    assert same(first.model.state_dict(), again.model.state_dict())
    assert not same(first.model.state_dict(), usual.model.state_dict())
    assert all(value.dtype != torch.bfloat16 for value in first.model.state_dict().values())


def key(**train: Any) -> str:
    inside = ", ".join(f"{name}: {value}" for name, value in {"epochs": 1, **train}.items())
    recipe = parse_recipe(f"data: digits\nmodel: small_cnn\ntrain: {{{inside}}}\nvariants: {{a: }}")
    return make_plan(recipe, "data", lambda kind, one: "source").fit_keys["a", 0]


def test_what_a_training_computes_is_in_its_key() -> None:
    keys = [
        key(),
        key(accumulate=4),
        key(checkpointing="true"),
        key(deterministic="true"),
        key(compile="auto"),
        key(compile="true"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key(accumulate=1, checkpointing="false", deterministic="false", compile="false")
    for wrong in ("accumulate=0", "compile=maybe", "checkpointing=3"):
        name, value = wrong.split("=")
        with pytest.raises(RecipeError, match=name):
            key(**{name: value})
