"""Budgets are met, by the fewest channels; what cannot be met is said."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

import robustkit
from robustkit.attacks.threat import Threat
from robustkit.compress.budget import Budget, file_bytes, least_share
from robustkit.compress.channels import ChannelL2, dead_channels
from robustkit.compress.costs import count_macs, gzip_size
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import sparsity_of, zero_masks
from robustkit.compress.prune import GlobalL1
from robustkit.compress.shrink import Shrink
from robustkit.data.split import split_of
from robustkit.errors import ModelError, RecipeError
from robustkit.models.artefact import save_model
from robustkit.models.small_cnn import SmallCnn
from robustkit.models.widths import widths_of
from robustkit.params import Bytes
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import Use
from robustkit.results import Latency

SHAPE = (1, 8, 8)


def network() -> SmallCnn:
    torch.manual_seed(0)
    return SmallCnn(SHAPE, 10, [16, 32]).eval()


def saved(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.safetensors"
    use = Use(name="small_cnn", parameters={"widths": [16, 32]}, label="m")
    save_model(model, path, use, shape=SHAPE, classes=[str(number) for number in range(10)])
    return path


def keeper(*methods: object) -> MaskKeeper:
    train = split_of(torch.zeros(8, *SHAPE, dtype=torch.uint8), torch.arange(8))
    return MaskKeeper(
        methods,
        inherit=False,
        context_seed=0,
        example=torch.zeros(2, *SHAPE),
        threat=Threat("linf", 0.1),
        train=train,
    )


def test_the_least_share_is_found() -> None:
    assert least_share(lambda share: 1 - share, 0.3, tries=12) == pytest.approx(0.7, abs=2**-12)
    assert least_share(lambda share: 1 - share, 1.0) == 0.0
    with pytest.raises(ModelError, match=r"0\.1 cannot be met: .* takes 0\.5"):
        least_share(lambda share: 1 - share / 2, 0.1)


@pytest.mark.parametrize("method", ["channel_l2", "channel_random"])
def test_macs_are_met_by_the_fewest_channels(method: str) -> None:
    model = network()
    whole = count_macs(model, SHAPE)
    held = keeper(Budget(method=method, macs=0.5), Shrink())  # type: ignore[arg-type]
    small = held.finish(held.compress(copy.deepcopy(model)))
    share = count_macs(small, SHAPE) / whole
    assert 0.4 < share <= 0.5
    assert any("of the MACs, 0.5 is allowed" in note for note in held.notes)
    fewest = max(dead / width for _, dead, width in dead_channels(held.compress(model), torch.zeros(2, *SHAPE)))
    fewer = keeper(ChannelL2(fewest - 1 / 16), Shrink())
    assert count_macs(fewer.finish(fewer.compress(network())), SHAPE) / whole > 0.5


def test_bytes_are_met(tmp_path: Path) -> None:
    held = keeper(Budget(bytes=30_000), Shrink())
    small = held.finish(held.compress(network()))
    assert 20_000 < file_bytes(small) <= 30_000
    path = saved(small, tmp_path)
    held.shipped(small, path)
    assert held.notes[-1] == f"budget: {path.stat().st_size:.4g} bytes as shipped, 3e+04 is allowed"
    path.write_bytes(bytes(30_001))
    with pytest.raises(ModelError, match=r"budget: 3e\+04 bytes as shipped"):
        held.shipped(small, path)
    with pytest.raises(ModelError, match="cannot be met"):
        keeper(Budget(bytes=1000)).compress(network())


@pytest.mark.parametrize(
    ("text", "size"), [("1MB", 1_000_000), ("1.5 MB", 1_500_000), ("20kB", 20_000), ("77", 77), (5, 5)]
)
def test_sizes_are_written_with_units(text: object, size: int) -> None:
    assert TypeAdapter(Bytes).validate_python(text) == size


@pytest.mark.parametrize("text", ["1TB", "many", "-1", True, 0])
def test_other_sizes_are_refused(text: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Bytes).validate_python(text)


@pytest.mark.parametrize("given", ["{}", "{macs: 50%, bytes: 1MB}"])
def test_a_budget_is_exactly_one(given: str) -> None:
    text = (
        "name: b\ndata: digits\nmodel: small_cnn\nvariants:\n  baseline:\n"
        f"  slim: {{from: baseline, compress: [budget: {given}, shrink]}}\n"
    )
    with pytest.raises(RecipeError, match="exactly one of macs, latency, bytes, gzip_bytes"):
        parse_recipe(text)


@pytest.mark.parametrize(
    "method", ["global_l1", "random", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layer_l1", "lamp"))]
)
def test_single_weights_meet_bytes_after_gzip_with_the_fewest_zeros(method: str, tmp_path: Path) -> None:
    held = keeper(Budget(method=method, gzip_bytes=25_000))  # type: ignore[arg-type]
    model = held.finish(held.compress(network()))
    path = saved(model, tmp_path)
    held.shipped(model, path)
    reached = gzip_size(path.read_bytes())
    assert 22_000 < reached <= 25_000 < gzip_size(saved(network(), tmp_path).read_bytes())
    assert held.notes[-1] == f"budget: {reached:.4g} bytes after gzip as shipped, 2.5e+04 is allowed"
    share = sparsity_of(model)
    fewer = keeper(Budget(method=method, gzip_bytes=27_000))  # type: ignore[arg-type]
    assert 0.1 < sparsity_of(fewer.compress(network())) < share
    with pytest.raises(ModelError, match="cannot be met"):
        keeper(Budget(method=method, gzip_bytes=1000)).compress(network())  # type: ignore[arg-type]


def test_what_is_zero_already_counts_towards_gzipped_bytes() -> None:
    pruned = keeper(GlobalL1(0.8)).compress(network())
    held = keeper(Budget(method="global_l1", gzip_bytes=40_000))
    held._held = zero_masks(pruned)
    assert sparsity_of(held.compress(pruned)) == pytest.approx(0.8, abs=1e-3), "80 % is below the budget already"


def test_channels_that_are_zero_already_count_towards_a_budget() -> None:
    pruned = keeper(ChannelL2(0.25)).compress(network())
    held = keeper(Budget(macs=0.5), Shrink())
    held._held = zero_masks(pruned)
    small = held.finish(held.compress(pruned))
    assert 0.4 < count_macs(small, SHAPE) / count_macs(network(), SHAPE) <= 0.5


def test_channels_meet_bytes_after_gzip_shrunk(tmp_path: Path) -> None:
    held = keeper(Budget(gzip_bytes=25_000), Shrink())
    small = held.finish(held.compress(network()))
    path = saved(small, tmp_path)
    held.shipped(small, path)
    assert 15_000 < gzip_size(path.read_bytes()) <= 25_000


def test_what_is_shipped_without_shrink_is_measured_as_it_will_be(tmp_path: Path) -> None:
    held = keeper(Budget(macs=0.5))
    model = held.finish(held.compress(network()))
    held.shipped(model, saved(model, tmp_path))
    assert "of the MACs once `shrink` has removed the channels, 0.5 is allowed" in held.notes[-1]
    shrunk = keeper(Budget(macs=0.5), Shrink())
    small = shrunk.finish(shrunk.compress(network()))
    shrunk.shipped(small, saved(small, tmp_path))
    assert "of the MACs as shipped, 0.5 is allowed" in shrunk.notes[-1]
    with pytest.raises(ModelError, match=r"budget: 1 of the MACs as shipped, 0\.5 is allowed"):
        Budget(macs=0.5).shipped(network(), Widened(network()), tmp_path, shrunk._context(model))


class Widened(nn.Module):
    """A model that does the same work, with a parameter that makes it look changed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.more = inner, nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y


def test_a_latency_that_is_missed_after_the_training_is_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = keeper(Budget(latency=0.5))
    model = network()
    for measured, flags in ((0.4, []), (0.6, ["budget-missed"])):
        times = {
            name: {"batch_1": Latency(median=value, q1=value, q3=value, p95=value, runs=5)}
            for name, value in (("small", measured), ("whole", 1.0))
        }
        monkeypatch.setattr("robustkit.compress.budget.measure_latency", lambda *_, times=times, **__: times)
        held._whole = Widened(model)
        held.shipped(model, tmp_path)
        assert [flag.id for flag in held.flags] == flags
        assert f"{measured} of the latency as shipped, 0.5 is allowed" in held.notes[-1]


@pytest.mark.parametrize("budget", ["macs: 50%", "latency: 50%", "bytes: 1MB"])
def test_zeros_bring_only_bytes_after_gzip(budget: str) -> None:
    kind = budget.partition(":")[0]
    text = (
        "name: b\ndata: digits\nmodel: small_cnn\nvariants:\n  baseline:\n"
        f"  sparse: {{from: baseline, compress: [budget: {{method: global_l1, {budget}}}]}}\n"
    )
    with pytest.raises(RecipeError, match=f"zeros of global_l1 are stored and multiplied: they bring no {kind}"):
        parse_recipe(text)
    with pytest.raises(ModelError, match="can meet gzip_bytes only"):
        keeper(Budget(method="global_l1", macs=0.5)).compress(network())


RECIPE = """\
name: budgets
data: {digits: {limit: 300}}
model: {small_cnn: {widths: [8, 16]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 2, batch_size: 64}
variants:
  baseline:
  sparse: {from: baseline, compress: [budget: {method: global_l1, gzip_bytes: 9kB}], train: {epochs: 2}}
  slim: {from: baseline, compress: [budget: {macs: 40%}, shrink], train: {epochs: 2}}
evaluate: {examples: 20, attacks: [noise], latency: false}
"""


@pytest.mark.slow
def test_budgets_from_a_recipe_hold_for_the_files_and_last_epochs_are_shrunk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustkit.pipeline._write_report", lambda folder: folder / "report.html")
    rows = {row.name: row for row in robustkit.run(RECIPE, runs=tmp_path).variants}
    baseline, sparse, slim = rows["baseline"], rows["sparse"], rows["slim"]
    assert 0.8 * 9000 < sparse.gzip_bytes <= 9000 < baseline.gzip_bytes
    assert any(f"budget: {sparse.gzip_bytes:.4g} bytes after gzip as shipped" in note for note in sparse.notes)
    assert slim.macs <= 0.4 * baseline.macs
    assert any("of the MACs as shipped" in note for note in slim.notes)
    assert slim.model is not None
    last = robustkit.load((tmp_path / "budgets" / slim.model).parent / "last.safetensors")
    assert widths_of(last) == widths_of(robustkit.load(tmp_path / "budgets" / slim.model)) != {}
