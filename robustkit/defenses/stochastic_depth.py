"""Stochastic depth: residual blocks that are skipped at random while training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torchvision.models import resnet
from torchvision.ops import StochasticDepth as SkipRow

from robustkit.defenses.surgery import attach, attached, detach
from robustkit.errors import ModelError, UsageError
from robustkit.params import OpenShare
from robustkit.train.hooks import Defense

KIND = "stochastic_depth"


def branch_ends(model: nn.Module) -> list[nn.Module]:
    """Return the last module of each residual branch, before the shortcut is added, in the order of the model.

    A block says which it is by an attribute `branch_end`, the module's name; torchvision's ResNet blocks are known.
    """
    ends: list[nn.Module] = []
    for module in model.modules():
        name = getattr(module, "branch_end", None)
        if isinstance(module, resnet.BasicBlock):
            name = "bn2"
        elif isinstance(module, resnet.Bottleneck):
            name = "bn3"
        if isinstance(name, str):
            ends.append(module.get_submodule(name))
    return ends


def skip_chances(blocks: int, p: float) -> list[float]:
    """Return the chance to skip each block: linear from p / blocks to p at the last (Huang et al. 2016)."""
    return [p * (number + 1) / blocks for number in range(blocks)]


def insert_stochastic_depth(model: nn.Module, *, p: float) -> nn.Module:
    """Skip residual branches at random in train mode, by example; in place; return the model.

    What is kept is scaled by 1 / (1 - chance), so that the model computes in eval mode exactly what it did.
    Raises ModelError where the model has no residual block, UsageError where this was inserted already.
    """
    if attached(model, KIND):
        raise UsageError("stochastic_depth was inserted into this model already: use it once")
    ends = branch_ends(model)
    if not ends:
        raise ModelError(
            "stochastic_depth: this model has no residual block; use resnet18, wide_resnet, torchvision.resnet*, "
            "baseline_cnn: {residual: true}, or give your block an attribute branch_end (see docs/defenses.md)"
        )
    for module, chance in zip(ends, skip_chances(len(ends), p), strict=True):
        attach(module, SkipRow(chance, "row"), KIND)
    return model


@dataclass(frozen=True)
class StochasticDepth(Defense):
    """Skip residual blocks at random while training, deeper ones more often (Huang et al. 2016).

    p is the chance to skip the last block, in (0, 1); it falls linearly towards the first. Residual models only.
    """

    p: OpenShare = 0.2

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model with blocks that may be skipped."""
        return insert_stochastic_depth(model, p=self.p)

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Return the model without them."""
        return detach(model, KIND)
