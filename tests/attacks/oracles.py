"""Models whose robustness is known in closed form, and the closed forms."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Real 8x8 digits in [0, 1] (N, 1, 8, 8) and their labels."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).to(torch.float32)[:, None]
    return images, torch.from_numpy(bunch.target).to(torch.int64)


class Linear(nn.Module):
    """Logits W x + b of flattened images."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            self.layer.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits


@cache
def softmax_regression(strength: float = 1.0) -> Linear:
    """Softmax regression trained on the digits."""
    x, y = digits()
    fitted = LogisticRegression(C=strength, max_iter=500).fit(x.flatten(1).numpy(), y.numpy())
    return Linear(
        torch.from_numpy(fitted.coef_).to(torch.float32), torch.from_numpy(fitted.intercept_).to(torch.float32)
    )


def half_space(dimensions: int) -> Linear:
    """Logits (-z, z) with z = mean(x) - 1/2: at x = 0.75 the boundary lies at 0.25 (linf), 0.25 sqrt(d) (l2)."""
    weight = torch.full((dimensions,), 1 / dimensions, dtype=torch.float64)
    return Linear(torch.stack([-weight, weight]), torch.tensor([0.5, -0.5], dtype=torch.float64))


def slack(model: Linear, x: Tensor, y: Tensor, norm: str, eps: float | np.ndarray, *, box: bool = True) -> np.ndarray:
    """Margin that is left at the worst point of the ball (N,), in float64: positive means robust.

    eps: one for all, or one an example (N,).
    """
    radius = np.broadcast_to(np.asarray(eps, dtype=np.float64), (len(y),))[:, None]
    weight = model.layer.weight.detach().double().numpy()
    bias = model.layer.bias.detach().double().numpy()
    images, labels = x.flatten(1).double().numpy(), y.numpy()
    logits = images @ weight.T + bias
    worst = np.full(len(labels), np.inf)
    for other in range(len(weight)):
        rows = labels != other
        v = weight[other] - weight[labels[rows]]
        own = logits[rows, labels[rows]] - logits[rows, other]
        low = -images[rows] if box else np.full_like(v, -np.inf)
        high = 1 - images[rows] if box else np.full_like(v, np.inf)
        gain = {"linf": _linf, "l2": _l2, "l1": _l1, "l0": _l0}[norm](v, low, high, radius[rows])
        worst[rows] = np.minimum(worst[rows], own - gain)
    return worst


def _linf(v: np.ndarray, low: np.ndarray, high: np.ndarray, eps: np.ndarray) -> np.ndarray:
    return np.maximum(v * np.maximum(low, -eps), v * np.minimum(high, eps)).sum(1)


def _l2(v: np.ndarray, low: np.ndarray, high: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """max v.d with |d| <= eps in the box: d = clip(s v), s by bisection."""
    small, large = np.zeros(len(v)), np.full(len(v), 1e6)
    for _ in range(200):
        middle = (small + large) / 2
        long = np.linalg.norm(np.clip(v * middle[:, None], low, high), axis=1) > eps[:, 0]
        small, large = np.where(long, small, middle), np.where(long, middle, large)
    return (v * np.clip(v * small[:, None], low, high)).sum(1)


def _l1(v: np.ndarray, low: np.ndarray, high: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """max v.d with |d|_1 <= eps in the box: fill the steepest pixels first."""
    room = np.where(v > 0, high, -low)
    order = np.argsort(-np.abs(v), axis=1)
    steep, space = np.take_along_axis(np.abs(v), order, 1), np.take_along_axis(room, order, 1)
    before = np.cumsum(space, axis=1) - space if np.isfinite(space).all() else np.zeros_like(space)
    spent = np.clip(eps - before, 0, space)
    if not np.isfinite(space).all():
        spent = np.where(np.arange(v.shape[1])[None] == 0, eps, 0.0)
    return (steep * spent).sum(1)


def exact_distance(model: Linear, x: Tensor, y: Tensor, norm: str) -> np.ndarray:
    """Norm of the smallest change in the box that fools the model (N,), 0 where it is wrong already, in float64.

    By bisection for the budget at which no slack is left; for l2 for the multiple of the weights that reaches a class.
    """
    wrong = slack(model, x, y, norm, 0.0) <= 0
    if norm == "l0":
        left = np.stack([slack(model, x, y, norm, count) for count in range(x[0].numel() + 1)]) <= 0
        return np.where(left.any(0), left.argmax(0), np.inf)
    if norm == "l2":
        return np.where(wrong, 0.0, _l2_distance(model, x, y))
    low, high = np.zeros(len(y)), np.full(len(y), {"linf": 1.0, "l1": x[0].numel()}[norm], dtype=np.float64)
    reachable = slack(model, x, y, norm, high) <= 0
    for _ in range(60):
        middle = (low + high) / 2
        robust = slack(model, x, y, norm, middle) > 0
        low, high = np.where(robust, middle, low), np.where(robust, high, middle)
    return np.where(wrong, 0.0, np.where(reachable, high, np.inf))


def _l2_distance(model: Linear, x: Tensor, y: Tensor) -> np.ndarray:
    weight = model.layer.weight.detach().double().numpy()
    bias = model.layer.bias.detach().double().numpy()
    images, labels = x.flatten(1).double().numpy(), y.numpy()
    logits, rows = images @ weight.T + bias, np.arange(len(labels))
    shortest = np.full(len(labels), np.inf)
    for other in range(len(weight)):
        v = weight[other] - weight[labels]
        need = logits[rows, labels] - logits[:, other]
        small, large = np.zeros(len(v)), np.full(len(v), 1e6)
        for _ in range(200):
            middle = (small + large) / 2
            short = (v * np.clip(v * middle[:, None], -images, 1 - images)).sum(1) < need
            small, large = np.where(short, middle, small), np.where(short, large, middle)
        change = np.clip(v * large[:, None], -images, 1 - images)
        there = ((v * change).sum(1) >= need) & (labels != other)
        shortest = np.where(there, np.minimum(shortest, np.linalg.norm(change, axis=1)), shortest)
    return shortest


def _l0(v: np.ndarray, low: np.ndarray, high: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """max v.d with at most eps values of d not zero, in the box: the values of the largest gain go to their bounds."""
    gain = np.sort(np.maximum(v * low, v * high), axis=1)[:, ::-1]
    return np.where(np.arange(v.shape[1])[None] < eps, gain, 0.0).sum(1)
