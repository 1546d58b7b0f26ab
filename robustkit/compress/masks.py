"""Masks beside a plain model: which weights stay zero. No hooks, so copies, EMA, state dicts and export work."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized

PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass
class Masks:
    """Tensors of zeros and ones by parameter name, each of its parameter's shape; a parameter without one is free."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, like: Tensor) -> Tensor:
        """Return the mask of a parameter; ones where it has none."""
        found = self.tensors.get(name)
        return torch.ones_like(like) if found is None else found.to(like.device)

    def narrowed(self, other: Mapping[str, Tensor]) -> Masks:
        """Return masks that keep a weight only where these and `other` keep it."""
        merged = dict(self.tensors)
        for name, mask in other.items():
            known = merged.get(name)
            merged[name] = mask.clone() if known is None else known.to(mask.device) * mask
        return Masks(merged)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the masked weights of a model to zero, in place."""
        for name, mask in self.tensors.items():
            parameter = stored_parameter(model, name)
            if mask.device != parameter.device:
                mask = self.tensors[name] = mask.to(parameter.device)
            parameter.mul_(mask)

    @torch.no_grad()
    def apply_to_gradients_(self, model: nn.Module) -> None:
        """Set the gradients of masked weights to zero, in place."""
        for name, mask in self.tensors.items():
            gradient = stored_parameter(model, name).grad
            if gradient is not None:
                gradient.mul_(mask.to(gradient.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks as booleans by name."""
        return {name: mask.bool().cpu() for name, mask in self.tensors.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Masks:
        """Return the masks that state_dict described."""
        return cls({name: mask.to(torch.float32) for name, mask in state.items()})


def stored_parameter(model: nn.Module, name: str) -> Tensor:
    """Return the parameter of this name; where spectral norm computes it from another one, that other one.

    Zeros of the one are zeros of the other.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if is_parametrized(module, leaf):
        return module.get_parameter(f"parametrizations.{leaf}.original")
    return model.get_parameter(name)


def prunable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that sparsity counts: of convolutions and linear layers, by parameter name."""
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE):
            yield (f"{name}.weight" if name else "weight"), module.weight


def zero_masks(model: nn.Module) -> Masks:
    """Return masks that hold every weight that is exactly zero now, batch norm and biases included."""
    found = {}
    for name, parameter in model.named_parameters():
        mask = (parameter.detach() != 0).to(parameter.dtype)
        if not bool(mask.all()):
            found[name] = mask
    return Masks(found)


def sparsity_of(model: nn.Module) -> float:
    """Return the share of zeros among the prunable weights, in [0, 1]."""
    zeros = total = 0
    for _, weight in prunable(model):
        zeros += int((weight == 0).sum())
        total += weight.numel()
    return zeros / total if total else 0.0


def hooked_names(module: nn.Module) -> list[str]:
    """Return the tensor names of a module that torch.nn.utils.prune hooks rebuild at each forward."""
    return [
        hook._tensor_name for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)
    ]


def is_hooked(model: nn.Module) -> bool:
    """Say whether torch.nn.utils.prune hooks rebuild any tensor of the model."""
    return any(hooked_names(module) for module in model.modules())


def hook_masks(model: nn.Module) -> Masks:
    """Return the masks of a model's torch.nn.utils.prune hooks, by the names that `without_hooks` leaves."""
    return Masks(
        {
            f"{label}.{name}" if label else name: getattr(module, f"{name}_mask").detach().clone()
            for label, module in model.named_modules()
            for name in hooked_names(module)
        }
    )


def without_hooks(model: nn.Module) -> nn.Module:
    """Return the model itself where it has no torch.nn.utils.prune hooks, else its plain copy."""
    return plain_copy(model) if is_hooked(model) else model


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy without torch.nn.utils.prune hooks: plain parameters with zeros; the model itself is not changed.

    The derived tensors are detached first: a deepcopy fails on them after any forward with gradients.
    """
    for module in model.modules():
        for name in hooked_names(module):
            setattr(module, name, getattr(module, f"{name}_orig").detach() * getattr(module, f"{name}_mask"))
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name in hooked_names(module):
            prune.remove(module, name)
    return copied
