"""Pruning: exactly as sparse as asked, zeros that stay, channels that go together, plain models in and out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.compress.base import CompressContext, Compressor, cubic_sparsity
from robustkit.compress.channels import ChannelL2, channel_groups, channel_masks, dead_channels
from robustkit.compress.costs import count_macs, measure_costs, measure_latency
from robustkit.compress.keeper import MaskKeeper, as_compressor, updates_due
from robustkit.compress.masks import Masks, plain_copy, prunable, sparsity_of, zero_masks
from robustkit.compress.prune import GlobalL1, LayerL1, RandomWeights, global_masks, layer_masks, magnitude_scores
from robustkit.data.split import Split, split_of
from robustkit.errors import ModelError, UsageError
from robustkit.models.baseline_cnn import BaselineCnn
from robustkit.models.resnet import ResNet
from robustkit.models.small_cnn import SmallCnn
from robustkit.models.wide_resnet import WideResNet
from robustkit.train.hooks import Step

THREAT = Threat("linf", 0.1)


def network(seed: int = 0) -> SmallCnn:
    torch.manual_seed(seed)
    return SmallCnn((1, 8, 8), 10, [8, 16])


def context(channels: int = 1, side: int = 8) -> CompressContext:
    return CompressContext(torch.zeros(2, channels, side, side), torch.Generator().manual_seed(0), THREAT)


def images(shape: tuple[int, int, int] = (1, 8, 8)) -> Split:
    drawn = torch.randint(0, 256, (40, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return split_of(drawn, torch.arange(40) % 10)


def keeper(*methods: object, inherit: bool = False, shape: tuple[int, int, int] = (1, 8, 8)) -> MaskKeeper:
    return MaskKeeper(
        methods, inherit=inherit, context_seed=0, example=torch.zeros(2, *shape), threat=THREAT, train=images(shape)
    )


def zeros(model: nn.Module) -> tuple[int, int]:
    weights = [weight for _, weight in prunable(model)]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


METHODS: list[Callable[[float], Compressor]] = [
    lambda sparsity: GlobalL1(sparsity),
    lambda sparsity: LayerL1(sparsity),
    lambda sparsity: RandomWeights(sparsity),
]


@settings(max_examples=40, deadline=None)
@given(sparsity=st.floats(0, 0.97), method=st.sampled_from(METHODS), seed=st.integers(0, 5))
def test_the_sparsity_reached_is_what_was_asked_within_one_weight(
    sparsity: float, method: Callable[[float], Compressor], seed: int
) -> None:
    model = network(seed)
    one = keeper(method(sparsity))
    pruned = one.finish(one.compress(model))
    dropped, total = zeros(pruned)
    assert abs(dropped - sparsity * total) <= 1
    assert all(bool(weight.any()) for _, weight in prunable(pruned)), "no layer is emptied"


def test_the_smallest_weights_go_first_over_all_layers() -> None:
    model = network()
    kept = global_masks(magnitude_scores(model), Masks(), 0.7).tensors
    weights = torch.cat([weight.detach().abs().flatten() for _, weight in prunable(model)])
    mask = torch.cat([kept[name].flatten() for name, _ in prunable(model)]).bool()
    assert float(weights[~mask].max()) <= float(weights[mask].min())


def test_masks_are_those_of_torch_nn_utils_prune() -> None:
    model, other = network(), network()
    masks = layer_masks(magnitude_scores(model), Masks(), 0.5).tensors
    for name, module in other.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(module, "weight", amount=0.5)
            assert torch.equal(masks[f"{name}.weight"], module.weight_mask)
    other = network()
    pairs = [(module, "weight") for module in other.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.5)
    masks = global_masks(magnitude_scores(model), Masks(), 0.5).tensors
    for name, module in other.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert torch.equal(masks[f"{name}.weight"], module.weight_mask)


def test_no_layer_loses_more_than_its_cap_and_the_others_give_instead() -> None:
    model = network()
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    method = GlobalL1(0.5, max_layer_sparsity=0.6)
    one = keeper(method)
    one.finish(one.compress(model))
    assert int((model.head.weight == 0).sum()) == int(0.6 * model.head.weight.numel())
    assert abs(sparsity_of(model) - 0.5) < 1e-3
    free = network()
    with torch.no_grad():
        free.head.weight.mul_(1e-6)
    open_one = keeper(GlobalL1(0.5, max_layer_sparsity=1.0))
    open_one.finish(open_one.compress(free))
    assert not bool(free.head.weight.any()), "asked for, a layer may be emptied"
    with pytest.raises(ModelError, match="max_layer_sparsity"):
        keeper(GlobalL1(0.9, max_layer_sparsity=0.5)).compress(network())


def test_sparsity_is_the_total_and_does_not_compound() -> None:
    model = network()
    keeper(GlobalL1(0.5)).compress(model)
    before = {name: weight == 0 for name, weight in prunable(model)}
    child = keeper(GlobalL1(0.8), inherit=True)
    child.finish(child.compress(model))
    assert abs(sparsity_of(model) - 0.8) < 1e-3
    assert all(bool((weight[before[name]] == 0).all()) for name, weight in prunable(model))
    with pytest.raises(ModelError, match="zero already"):
        keeper(GlobalL1(0.3), inherit=True).compress(model)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=1e-2),
        lambda weights: torch.optim.AdamW(weights, lr=0.01),
    ],
)
def test_zeros_stay_zero_under_momentum_and_weight_decay(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model = network()
    made = optimizer(model.parameters())
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 10

    def step() -> None:
        made.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        made.step()

    for _ in range(3):
        step()
    one = keeper(GlobalL1(0.8))
    one.prepare_model(model)
    before = {name: weight == 0 for name, weight in prunable(model)}
    for number in range(5):
        step()
        moved = any(bool((weight[before[name]] != 0).any()) for name, weight in prunable(model))
        assert moved, "or the test shows nothing"
        one.after_step(Step(model, 0, 1, number / 5, THREAT, torch.Generator()))
        assert all(torch.equal(weight == 0, before[name]) for name, weight in prunable(model))


def test_a_cubic_schedule_rises_as_in_the_paper() -> None:
    assert cubic_sparsity(0.0, 0.8, 0) == 0
    assert cubic_sparsity(0.0, 0.8, 1) == pytest.approx(0.8)
    assert cubic_sparsity(0.2, 0.8, 0.5) == pytest.approx(0.8 - 0.6 * 0.125)
    method = GlobalL1(0.8, schedule="cubic", begin=0.2, end=0.6, updates=4)
    assert [updates_due(method, share) for share in (0, 0.19, 0.2, 0.3, 0.45, 0.6, 1)] == [0, 0, 0, 1, 2, 4, 4]


def test_an_iterative_schedule_rises_in_equal_steps() -> None:
    model = network()
    one = keeper(GlobalL1(0.8, schedule="iterative", begin=0.0, end=1.0, updates=4))
    one.prepare_model(model)
    seen = []
    for number in range(9):
        one.after_step(Step(model, 0, 1, number / 8, THREAT, torch.Generator()))
        seen.append(sparsity_of(model))
    assert seen == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8], abs=1e-3)
    one.finish(model)


def test_a_cubic_schedule_reaches_its_sparsity_while_training() -> None:
    model = network()
    one = keeper(GlobalL1(0.9, schedule="cubic", begin=0.0, end=0.5, updates=5))
    one.prepare_model(model)
    assert zeros(model)[0] == 0
    seen, ready = [], []
    for number in range(21):
        step = Step(model, 0, 1, number / 20, THREAT, torch.Generator())
        one.after_step(step)
        seen.append(sparsity_of(model))
        ready.append(one.ready(step))
    assert seen == sorted(seen)
    assert len(set(seen)) == 6
    assert ready.index(True) == 10
    one.finish(model)
    assert abs(seen[-1] - 0.9) < 1e-3


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (SmallCnn((1, 8, 8), 10, [8, 16]), (1, 8, 8)),
        (BaselineCnn((1, 16, 16), 10, residual=True), (1, 16, 16)),
        (ResNet((3, 16, 16), 10, (2, 2, 2, 2), 8), (3, 16, 16)),
        (WideResNet((3, 16, 16), 10, depth=10, width=1), (3, 16, 16)),
    ],
    ids=["small_cnn", "baseline_cnn residual", "resnet18", "wide_resnet"],
)
def test_channels_go_together(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """A masked channel carries exactly zero out of every layer that writes it, and the classifier stays whole."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.bias, -1, 1)
    example = torch.rand(2, *shape)
    masks = channel_masks(model, Masks(), 0.5, example)
    masks.apply_(model)
    groups = list(channel_groups(model, example))
    assert groups
    by_name = {name: (dead, width) for name, dead, width in dead_channels(model, example)}
    for group in groups:
        dead, width = by_name[group.name]
        assert dead == round(0.5 * width)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert bool((last.weight != 0).all())
    logits = model(example)
    assert bool(torch.isfinite(logits).all())
    assert not torch.equal(logits[0], logits[1])


def test_residual_layers_share_their_channels() -> None:
    model = ResNet((3, 16, 16), 10, (2, 2, 2, 2), 8)
    masks = channel_masks(model, Masks(), 0.5, torch.rand(2, 3, 16, 16)).tensors
    stem = masks["conv1.weight"].flatten(1).amax(1)
    for name in ("blocks.0.conv2.weight", "blocks.1.conv2.weight"):
        assert torch.equal(masks[name].flatten(1).amax(1), stem), "what is added up is masked alike"
    assert not torch.equal(masks["blocks.0.conv1.weight"].flatten(1).amax(1), stem)


def test_the_weakest_channels_go() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    with torch.no_grad():
        for channel, size in enumerate((3.0, 1.0, 4.0, 2.0)):
            model[0].weight[channel].fill_(size)  # type: ignore[operator,index]
    found = channel_masks(model, Masks(), 0.5, torch.rand(2, 1, 8, 8)).tensors["0.weight"]
    assert found.flatten(1).amax(1).tolist() == [1, 0, 1, 0]
    found = channel_masks(model, Masks(), 0.99, torch.rand(2, 1, 8, 8)).tensors["0.weight"]
    assert found.flatten(1).amax(1).tolist() == [0, 0, 1, 0], "one channel is always left"


def test_channels_that_are_missing_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"channel_l2: 0 of \d+ channels of .* are zero, \d+ were asked for"):
        ChannelL2(0.5).check(network(), context())


def test_channel_sparsity_is_the_total() -> None:
    model = network()
    keeper(ChannelL2(0.5)).compress(model)
    with pytest.raises(ModelError, match=r"\d+ of \d+ channels .* are zero already; .* 25\.0% is less"):
        keeper(ChannelL2(0.25), inherit=True).prepare_model(copy.deepcopy(model))
    child = keeper(ChannelL2(0.625, schedule="cubic", end=1.0), inherit=True)
    child.prepare_model(model)
    seen = []
    for number in range(11):
        child.after_step(Step(model, 0, 1, number / 10, THREAT, torch.Generator()))
        seen.append([dead / width for _, dead, width in dead_channels(model, torch.zeros(2, 1, 8, 8))])
    assert seen == sorted(seen)
    assert set(seen[0]) == {0.5}
    assert set(seen[-1]) == {0.625}
    child.finish(model)


def test_a_channel_schedule_starts_from_the_share_of_channels_and_not_of_weights() -> None:
    model = network()
    keeper(GlobalL1(0.8)).compress(model)
    child = keeper(ChannelL2(0.5, schedule="cubic", end=1.0), inherit=True)
    child.prepare_model(model)
    for number in range(11):
        child.after_step(Step(model, 0, 1, number / 10, THREAT, torch.Generator()))
    assert [2 * dead for _, dead, _ in dead_channels(model, torch.zeros(2, 1, 8, 8))] == [
        width for _, _, width in dead_channels(model, torch.zeros(2, 1, 8, 8))
    ]


@pytest.mark.parametrize("method", [GlobalL1(0.8, "cubic"), ChannelL2(0.5, "cubic"), RandomWeights(0.8, "cubic")])
def test_a_schedule_that_the_training_cut_short_is_completed_with_a_flag(method: Compressor) -> None:
    model = network()
    one = keeper(method)
    one.prepare_model(model)
    one.after_step(Step(model, 0, 1, 0.2, THREAT, torch.Generator()))
    assert not one.ready(Step(model, 0, 1, 0.2, THREAT, torch.Generator()))
    one.finish(model)
    assert [(flag.id, flag.severity) for flag in one.flags] == [("pruned-after-training", "doubt")]
    method.check(model, context())
    whole = keeper(method)
    whole.finish(whole.compress(network()))
    assert whole.flags == []


def test_what_cannot_be_reached_is_an_error_before_the_training() -> None:
    with pytest.raises(ModelError, match="other methods or its parent"):
        keeper(GlobalL1(0.5), ChannelL2(0.5)).prepare_model(network())
    with pytest.raises(ModelError, match="other methods or its parent"):
        keeper(GlobalL1(0.5, "cubic"), ChannelL2(0.5, "cubic")).prepare_model(network())
    model, masks = network(), keeper(ChannelL2(0.5, "cubic"), GlobalL1(0.8, "cubic"))
    before = copy.deepcopy(model.state_dict())
    masks.prepare_model(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not masks.masks.tensors


def test_a_layer_may_be_emptied_where_it_is_asked_for() -> None:
    with pytest.raises(ModelError, match=r"100\.0% would drop more than max_layer_sparsity=0\.99"):
        keeper(LayerL1(1.0)).prepare_model(network())
    one = keeper(LayerL1(1.0, max_layer_sparsity=1.0))
    assert sparsity_of(one.finish(one.compress(network()))) == 1.0


def test_holding_masks_asks_the_device_nothing() -> None:
    """A hidden `.item()`, or a mask that was left on the CPU, raises on the meta device."""
    model = network()
    one = keeper(ChannelL2(0.25), GlobalL1(0.8, "cubic", begin=0.5))
    one.prepare_model(model)
    model.to("meta")
    one.after_step(Step(model, 0, 1, 0.2, THREAT, torch.Generator()))
    assert all(mask.is_meta for mask in one.masks.tensors.values())


def test_the_same_table_for_every_method_of_the_registry() -> None:
    for name in registry.BUILTIN["compressor"]:
        entry = registry.find("compressor", name)
        if not any(parameter.name == "sparsity" for parameter in registry.parameters(entry)):
            continue
        clean, problems = registry.check_parameters(entry, {"sparsity": "50%"})
        assert not problems
        method = as_compressor(registry.create(entry, clean))
        model = network()
        one = keeper(method)
        one.finish(one.compress(model))
        assert sparsity_of(model) > 0.3
        fresh = keeper(method)
        fresh.load_state_dict(one.state_dict())
        other = network()
        fresh.masks.apply_(other)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )


class EveryOther(prune.BasePruningMethod):
    """Drops every other weight."""

    PRUNING_TYPE: ClassVar[str] = "unstructured"  # type: ignore[misc]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def test_a_pruning_method_of_the_users_own() -> None:
    model = network()
    one = keeper(EveryOther())
    one.finish(one.compress(model))
    for _, weight in prunable(model):
        assert not bool(weight.flatten()[::2].any())
        assert bool((weight.flatten()[1::2] != 0).all())
    with pytest.raises(UsageError, match="no pruning method"):
        as_compressor("text")


def test_random_methods_of_torchs_follow_the_seed() -> None:
    models = [network(), network()]
    for model in models:
        torch.rand(3)
        before = torch.get_rng_state()
        keeper(prune.RandomUnstructured(0.5)).prepare_model(model)
        assert torch.equal(torch.get_rng_state(), before), "and leave the global generator alone"
    for (name, weight), (_, other) in zip(prunable(models[0]), prunable(models[1]), strict=True):
        assert torch.equal(weight, other), name


def test_torchs_own_methods_by_name() -> None:
    entry = registry.find("compressor", "torch.nn.utils.prune:L1Unstructured")
    clean, problems = registry.check_parameters(entry, {"amount": 0.25})
    assert not problems
    model = network()
    one = keeper(registry.create(entry, clean))
    one.finish(one.compress(model))
    assert sparsity_of(model) == pytest.approx(0.25, abs=0.01)


def test_a_model_that_arrives_with_hooks_is_understood_and_left_alone() -> None:
    model = network()
    prune.l1_unstructured(model.head, "weight", amount=0.6)
    prune.random_unstructured(model.head, "weight", amount=0.1)
    prune.l1_unstructured(model.groups[0].conv1, "weight", amount=0.5)  # type: ignore[union-attr,arg-type]
    x = torch.rand(4, 1, 8, 8)
    model.eval()
    expected = model(x)
    expected.sum().backward()
    names = list(model.state_dict())
    plain = plain_copy(model)
    assert torch.equal(plain(x), expected)
    assert set(plain.state_dict()) == set(network().state_dict())
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert list(model.state_dict()) == names
    assert prune.is_pruned(model)
    assert torch.equal(model(x), expected)
    copy.deepcopy(plain)
    masks = zero_masks(plain)
    assert float(masks.tensors["head.weight"].mean()) == pytest.approx(0.36, abs=0.02)
    one = keeper(GlobalL1(0.9), inherit=True)
    one.finish(one.compress(plain))
    assert abs(sparsity_of(plain) - 0.9) < 1e-3


@pytest.mark.parametrize("trained", [True, False])
def test_a_keeper_makes_hooked_models_plain_and_holds_what_the_hooks_drop(trained: bool) -> None:
    model = network()
    prune.l1_unstructured(model.head, "weight", amount=0.6)
    dropped = model.head.weight_mask == 0
    one = keeper(GlobalL1(0.7))
    plain = one.prepare_model(model) if trained else one.compress(model)
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert set(one.masks.tensors) <= set(dict(plain.named_parameters()))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    one.after_step(Step(plain, 0, 1, 0.5, THREAT, torch.Generator()))
    one.finish(plain)
    assert not bool(plain.head.weight[dropped].any())  # type: ignore[union-attr,index]
    assert abs(sparsity_of(plain) - 0.7) < 1e-3
    assert bool(plain.head.bias.all()), "a bias that was zero by chance is free"  # type: ignore[union-attr,operator]


def test_a_masked_model_is_a_plain_one(tmp_path: Path) -> None:
    """No hooks, so a copy, a state dict and a file are as of any model."""
    from robustkit.models.artefact import load_model, save_model
    from robustkit.models.build import build_model
    from robustkit.recipe.spec import Use

    use = Use(name="small_cnn", parameters={"widths": [8, 16]}, label="m")
    model = build_model(use, shape=(1, 8, 8), classes=10, mean=[0.5], std=[0.5]).eval()
    one = keeper(GlobalL1(0.8))
    one.finish(one.compress(model))
    x = torch.rand(4, 1, 8, 8)
    save_model(model, tmp_path / "m.safetensors", use, shape=(1, 8, 8), classes=tuple("0123456789"))
    loaded = load_model(tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert sparsity_of(loaded) == sparsity_of(model)


def test_costs_are_counted_on_the_model_and_its_file(tmp_path: Path) -> None:
    model = BaselineCnn((1, 28, 28), 10)
    keeper(GlobalL1(0.8), shape=(1, 28, 28)).compress(model)
    path = tmp_path / "file"
    path.write_bytes(bytes(1000) + b"".join(bytes([number % 251]) for number in range(1000)))
    costs = measure_costs(model, (1, 28, 28), path)
    # 24x24 positions x 64 x 25, 8x8 positions x 128 x 64 x 25, and the two linear layers.
    assert costs.macs == 576 * 64 * 25 + 64 * 128 * 64 * 25 + 2048 * 1024 + 1024 * 10 == count_macs(model, (1, 28, 28))
    assert costs.bytes == 2000
    assert costs.gzip_bytes < 600
    dropped, total = zeros(model)
    assert costs.sparsity == dropped / total
    assert sum(layer.zeros for layer in costs.layers) == dropped
    assert costs.nonzero == costs.parameters - dropped - sum(
        int((one == 0).sum()) for name, one in model.named_parameters() if name.endswith("bias")
    )


def test_latency_is_measured_in_turn() -> None:
    order: list[str] = []

    class Marked(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.weight = name, nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            order.append(self.name)
            return x.flatten(1)[:, :2] * self.weight

    found = measure_latency(
        {"a": Marked("a"), "b": Marked("b")}, (1, 4, 4), torch.device("cpu"), batch_sizes=(1, 8), runs=6
    )
    assert set(found["a"]) == {"batch_1", "batch_8"}
    assert found["a"]["batch_1"].runs == 6
    timed = order[6:18]
    assert timed == ["a", "b"] * 6
    one = found["b"]["batch_8"]
    assert 0 < one.q1 <= one.median <= one.q3 <= one.p95


def test_channel_sparsity_that_rounds_to_nothing_changes_nothing() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    one = keeper(ChannelL2(0.01))
    one.finish(one.compress(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert math.isclose(sparsity_of(model), 0.0)
