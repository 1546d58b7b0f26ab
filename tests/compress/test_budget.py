"""Budgets are met, by the fewest channels; what cannot be met is said."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from robustkit.attacks.threat import Threat
from robustkit.compress.budget import Budget, file_bytes, least_share
from robustkit.compress.channels import ChannelL2, dead_channels
from robustkit.compress.costs import count_macs
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.shrink import Shrink
from robustkit.data.split import split_of
from robustkit.errors import ModelError, RecipeError
from robustkit.models.small_cnn import SmallCnn
from robustkit.params import Bytes
from robustkit.recipe.schema import parse_recipe

SHAPE = (1, 8, 8)


def network() -> SmallCnn:
    torch.manual_seed(0)
    return SmallCnn(SHAPE, 10, [16, 32]).eval()


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


def test_bytes_are_met() -> None:
    held = keeper(Budget(bytes=30_000), Shrink())
    small = held.finish(held.compress(network()))
    assert 20_000 < file_bytes(small) <= 30_000
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
    with pytest.raises(RecipeError, match="exactly one of macs, latency, bytes"):
        parse_recipe(text)
