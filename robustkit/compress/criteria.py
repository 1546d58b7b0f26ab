"""Importance scores of single weights: by size within a layer, by gradients on training images, by data-free flow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from robustkit.compress.masks import Masks, prunable
from robustkit.compress.prune import Scores
from robustkit.defenses.constraints import remove_spectral_norm

Batches = list[tuple[Tensor, Tensor]]
"""Images (N, C, H, W) in [0, 1] with labels (N,)."""


def lamp_scores(model: nn.Module) -> Scores:
    """Return w^2 over the sum of the squares of all weights of its layer that are not smaller (Lee et al. 2021).

    arXiv 2010.07611, eq. 4. A layer's largest weight scores 1, so that no layer is emptied before the others.
    """
    found = {}
    for name, weight in prunable(model):
        # In double precision: the tail sums of millions of squares decide the order.
        squares = weight.detach().flatten().double().square()
        ordered, order = squares.sort(stable=True)
        tails = ordered.flip(0).cumsum(0).flip(0)
        scores = torch.empty_like(ordered)
        scores[order] = ordered / tails.clamp_min(torch.finfo(tails.dtype).tiny)
        found[name] = scores.view_as(weight)
    return found


def taylor_products(model: nn.Module, batches: Batches) -> Scores:
    """Return w dL/dw of the mean cross-entropy over all batches."""
    with scoring(model) as weights:
        total = [torch.zeros_like(weight) for weight in weights.values()]
        for x, y in batches:
            for place, gradient in enumerate(_gradients(_loss(model, x, y), list(weights.values()))):
                total[place] += gradient * len(y)
        seen = sum(len(y) for _, y in batches)
        pairs = zip(weights.items(), total, strict=True)
        return {name: (weight * gradient).detach() / seen for (name, weight), gradient in pairs}


def snip_scores(model: nn.Module, batches: Batches) -> Scores:
    """Return |w dL/dw| of the mean cross-entropy (Lee et al. 2019, SNIP, arXiv 1810.02340, eq. 5)."""
    return {name: product.abs() for name, product in taylor_products(model, batches).items()}


def taylor_scores(model: nn.Module, batches: Batches) -> Scores:
    """Return the mean over batches of (w dL/dw)^2: the squared change of the loss without a weight, to first order.

    Source: Molchanov et al. 2019, arXiv 1906.10771, eq. 8.
    """
    with scoring(model) as weights:
        total = [torch.zeros_like(weight) for weight in weights.values()]
        for x, y in batches:
            gradients = _gradients(_loss(model, x, y), list(weights.values()))
            for place, (weight, gradient) in enumerate(zip(weights.values(), gradients, strict=True)):
                total[place] += (weight * gradient).detach().square()
        return dict(zip(weights, (one / len(batches) for one in total), strict=True))


def grasp_scores(model: nn.Module, batches: Batches, temperature: float) -> Scores:
    """Return w (H g): how much of the gradient's flow a weight carries; may be negative (Wang et al. 2020, GraSP).

    arXiv 2002.07376, eq. 8: weights go whose removal lowers the norm of the gradient least. `temperature` divides the
    logits.
    """
    with scoring(model) as weights:
        listed = list(weights.values())
        total = [torch.zeros_like(weight) for weight in listed]
        for x, y in batches:
            gradients = _gradients(_loss(model, x, y, temperature), listed, further=True)
            flow = sum((gradient * gradient.detach()).sum() for gradient in gradients)
            assert isinstance(flow, Tensor)
            for place, product in enumerate(_gradients(flow, listed)):
                total[place] += product * len(y)
        return {name: (weight * one).detach() for (name, weight), one in zip(weights.items(), total, strict=True)}


def synflow_scores(model: nn.Module, current: Masks, example: Tensor) -> Scores:
    """Return |w dR/dw| where R is the sum of outputs of the net of absolute weights on ones (Tanaka et al. 2020).

    arXiv 2006.05467, eq. 3. `example` (N, C, H, W) gives the shape. Double precision, as deep nets overflow floats.
    """
    flow = remove_spectral_norm(copy.deepcopy(model)).double().eval()
    current.apply_(flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.abs_()
        for module in flow.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                # A mean that is taken off would turn the flow negative.
                module.running_mean.zero_()
    weights = dict(prunable(flow))
    for weight in weights.values():
        weight.requires_grad_(True)
    with torch.enable_grad():
        total = flow(torch.ones_like(example[:1], dtype=torch.float64)).sum()
        gradients = _gradients(total, list(weights.values()))
    return {
        name: (weight * gradient).abs().detach()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def ranks(scores: Scores) -> Scores:
    """Return positive scores of the same order over all layers, for scores that may be negative."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    places = torch.empty_like(flat, dtype=torch.float64)
    order = flat.argsort(stable=True)
    places[order] = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
    pieces = places.split([score.numel() for score in scores.values()])
    return {name: piece.view_as(scores[name]) for name, piece in zip(scores, pieces, strict=True)}


def _gradients(value: Tensor, weights: list[Tensor], *, further: bool = False) -> tuple[Tensor, ...]:
    """Return a scalar's gradients; zeros for weights that it does not depend on, as of layers that nothing calls."""
    return torch.autograd.grad(value, weights, create_graph=further, materialize_grads=True)


def _loss(model: nn.Module, x: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    return functional.cross_entropy(model(x).float() / temperature, y)


@contextmanager
def scoring(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Give the prunable weights with gradients on; dropout off, batch norm by its batch, nothing left changed.

    New weights have no running statistics to speak of: the statistics of the batch are right before and after training.
    A weight that is computed from another one, as by spectral norm, is computed once, so that it has a gradient.
    """
    modes = {module: module.training for module in model.modules()}
    asked: dict[Tensor, bool] = {}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    tracked = [norm.track_running_stats for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.track_running_stats = False
        with torch.enable_grad(), parametrize.cached():
            weights = dict(prunable(model))
            asked = {weight: weight.requires_grad for weight in weights.values() if weight.is_leaf}
            for weight in asked:
                weight.requires_grad_(True)
            yield weights
    finally:
        for norm, before in zip(norms, tracked, strict=True):
            norm.track_running_stats = before
        for weight, before in asked.items():
            weight.requires_grad_(before)
        for module, mode in modes.items():
            module.training = mode
