"""Constraints: bounds on gradients, on the weights of a unit, and on the gain of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, type_before_parametrizations

from robustkit.defenses.regularization import weights_of
from robustkit.errors import ModelError
from robustkit.params import PositiveFloat, PositiveInt
from robustkit.train.hooks import Defense, Step

START = 0
"""Seed of the power iteration's first vectors: they converge to the same ones, whatever the run's seed."""
SETTLED = 50
"""Forwards of train mode after which the vectors fit weights that were not trained with them."""


@torch.no_grad()
def project_rows_(parameters: Iterable[Tensor], limit: float) -> None:
    """Scale each output's incoming weights down to an l2 norm of at most `limit`, in place (Srivastava et al. 2014).

    Weights are (outputs, ...) of convolutions and linear layers.
    """
    for parameter in parameters:
        parameter.copy_(torch.renorm(parameter, p=2, dim=0, maxnorm=limit))


def insert_spectral_norm(model: nn.Module, iterations: int) -> nn.Module:
    """Divide the weight of every convolution and linear layer by its largest singular value (Miyato et al. 2018).

    In place, as a parametrization of torch's; convolutions count as matrices (outputs, everything else).
    `iterations` of the power method follow the singular value in each forward of train mode.
    Raises ModelError where there is no such layer, or one is parametrized already.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if not layers:
        raise ModelError("spectral_norm: this model has no convolution and no linear layer")
    if any(is_parametrized(layer) for layer in layers):
        raise ModelError("spectral_norm: the model's weights are parametrized already; use it once")
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(START)
        for layer in layers:
            spectral_norm(layer, n_power_iterations=iterations)
    return model


def spectral_vectors(model: nn.Module) -> set[str]:
    """Return the names of the buffers in which spectral norms keep their singular vectors."""
    return {
        f"{name}.{kept}"
        for name, module in model.named_modules()
        if isinstance(module, _SpectralNorm)
        for kept, _ in module.named_buffers(recurse=False)
    }


@torch.no_grad()
def settle_spectral_norm_(model: nn.Module) -> None:
    """Let the singular vectors of spectral norms follow weights that were put in from elsewhere; modes stay."""
    for module in model.modules():
        if not isinstance(module, ParametrizationList):
            continue
        weight = module.original
        for one in module:
            if isinstance(one, _SpectralNorm):
                training = one.training
                one.train()
                for _ in range(SETTLED):
                    one(weight)
                one.train(training)
                break
            weight = one(weight)


def remove_spectral_norm(model: nn.Module) -> nn.Module:
    """Make the weights plain again, at the values that the model computed with, and return the model."""
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear) and is_parametrized(module):
            _make_plain(module)
    return model


def _make_plain(module: nn.Conv2d | nn.Linear) -> None:
    mode = module.training
    # In train mode, reading the weight would move it: one more step of the power method.
    module.eval()
    weight, bias = module.weight.detach().clone(), module._parameters["bias"]
    module.train(mode)
    # torch's remove_parametrizations changes the class, which every deepcopy of the module shares.
    module.__class__ = type_before_parametrizations(module)
    del module.parametrizations
    # The bias is registered anew, to stand behind the weight as in every other model.
    del module.bias
    module.register_parameter("weight", nn.Parameter(weight))
    module.register_parameter("bias", bias)


@dataclass(frozen=True)
class SpectralNorm(Defense):
    """Keep every convolution and linear layer at a largest singular value of 1 while training (Miyato et al. 2018).

    iterations: steps of the power method in each forward. The stored model is plain: its weights are divided once.
    """

    iterations: PositiveInt = 1

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model with parametrized weights."""
        return insert_spectral_norm(model, self.iterations)

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Return the model with plain weights."""
        return remove_spectral_norm(model)


@dataclass(frozen=True)
class MaxNorm(Defense):
    """Bound the l2 norm of each unit's incoming weights after every step (Srivastava et al. 2014).

    limit is the largest norm, of each output of convolutions and linear layers; frozen ones stay.
    """

    limit: PositiveFloat = 3.0

    def after_step(self, step: Step) -> None:
        """Project the weights."""
        project_rows_((weight for weight in weights_of(step.model) if weight.requires_grad), self.limit)


@dataclass(frozen=True)
class GradientClipping(Defense):
    """Clip the gradients before every step (Pascanu et al. 2013).

    by norm: all gradients together are scaled down to an l2 norm of at most limit; by value: each entry is cut to
    [-limit, limit].
    """

    limit: PositiveFloat = 1.0
    by: Literal["norm", "value"] = "norm"

    def after_backward(self, step: Step) -> None:
        """Change the gradients in place."""
        parameters = [parameter for parameter in step.model.parameters() if parameter.grad is not None]
        if self.by == "norm":
            clip_grad_norm_(parameters, self.limit)
        else:
            clip_grad_value_(parameters, self.limit)
