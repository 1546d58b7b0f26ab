"""Pruning methods for torch.nn.utils.prune, torch's and a user's own: at once, and on a schedule."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from robustkit import registry
from robustkit.api import run
from robustkit.attacks.threat import Threat
from robustkit.compress.base import cubic_sparsity
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import sparsity_of
from robustkit.compress.torch_methods import TorchMethod, further
from robustkit.errors import RecipeError, UsageError
from robustkit.models.small_cnn import SmallCnn
from robustkit.train.hooks import Step

THREAT = Threat("linf", 0.1)

OWN = '''
import torch
from torch.nn.utils import prune


class Smallest(prune.L1Unstructured):
    """Drop the smallest weights."""

    def __init__(self, amount: float) -> None:
        super().__init__(amount)


class Odd(prune.BasePruningMethod):
    """Drop every other weight."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask
'''
RECIPE = """
data: {digits: {limit: 300}}
model: {small_cnn: {widths: [4, 4, 4]}}
train: {epochs: 1, optimizer: {sgd: {lr: 0.05}}}
evaluate: {attacks: [noise], examples: 20}
plugins: [own.py]
variants:
  grown: {compress: [{METHOD}]}
"""


class Outer(prune.LnStructured):
    """The channels of the smallest norm."""

    def __init__(self, amount: float) -> None:
        super().__init__(amount, n=2, dim=0)


class EveryOther(prune.BasePruningMethod):
    """Drops every other weight."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def at(model: nn.Module, progress: float, length: float) -> Step:
    return Step(model, 0, 1, progress, THREAT, torch.Generator(), length)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("L1Unstructured", {"amount": "75%"}),
        ("RandomUnstructured", {"amount": 0.75}),
        ("LnStructured", {"amount": "3/4", "n": 2, "dim": 0}),
        ("RandomStructured", {"amount": 0.75, "dim": 0}),
    ],
)
def test_torchs_methods_follow_a_cubic_schedule(name: str, parameters: dict[str, object]) -> None:
    entry = registry.find("compressor", f"torch.nn.utils.prune:{name}")
    values = {**parameters, "schedule": "cubic", "end": 0.8, "updates": 4}
    clean, problems = registry.check_parameters(entry, values)
    assert not problems
    torch.manual_seed(0)
    model = SmallCnn((1, 8, 8), 12, [8, 16])
    one = MaskKeeper(
        [registry.create(entry, clean)], inherit=False, context_seed=0, example=torch.zeros(2, 1, 8, 8), threat=THREAT
    )
    one.prepare_model(model)
    masks = [dict(one.masks.tensors)]
    for number in range(10):
        one.after_step(at(model, number / 10, 0.1))
        masks.append(dict(one.masks.tensors))
        due = min(4, int(((number + 1) / 10 + 1e-9) / 0.8 * 4))
        assert sparsity_of(model) == pytest.approx(cubic_sparsity(0.0, 0.75, due / 4), abs=0.03), number
    for before, after in pairwise(masks):
        assert all(bool((after[label] <= before[label]).all()) for label in before), "what is dropped stays dropped"
    assert one.ready(at(model, 1.0, 0.0))
    one.finish(model)
    for label, mask in one.masks.tensors.items():
        live = mask.flatten(1).any(1) if name.endswith("nStructured") or name == "RandomStructured" else mask
        assert abs(int((live == 0).sum()) - 0.75 * live.numel()) <= 1, label


def test_what_is_asked_again_sees_only_what_is_left() -> None:
    """Half of the layer is gone: three quarters of it in all are half of the rest."""
    weight = torch.tensor([[8.0, 7, 6, 5, 0, 0, 0, 0]])
    kept = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]])
    mask = further(prune.L1Unstructured(amount=0.9), weight, kept, 0.75)
    assert mask.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert torch.equal(further(prune.L1Unstructured(amount=0.9), weight, kept, 0.4), kept)


def test_a_users_method_grows_along_the_training_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{METHOD}", "Smallest: {amount: 60%, schedule: cubic, end: 0.9, updates: 5}"))
    (variant,) = run(path, runs=tmp_path / "runs").variants
    assert variant.sparsity == pytest.approx(0.6, abs=0.01)
    path.write_text(RECIPE.replace("{METHOD}", "Odd: {schedule: cubic}"))
    with pytest.raises(RecipeError, match="needs an `amount` that is a share"):
        run(path, runs=tmp_path / "runs")


def test_registered_methods_take_a_schedule_and_others_say_why_not() -> None:
    registry.register("compressor", "outer_channels")(Outer)
    entry = registry.find("compressor", "outer_channels")
    clean, problems = registry.check_parameters(entry, {"amount": 0.5, "schedule": "cubic"})
    assert not problems
    assert registry.create(entry, clean).schedule == "cubic"
    with pytest.raises(UsageError, match="share in"):
        TorchMethod(EveryOther(), schedule="cubic")
