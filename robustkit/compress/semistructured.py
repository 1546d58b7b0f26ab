"""N:M sparsity: of every m weights in a row, n stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustkit.compress.base import CompressContext
from robustkit.compress.masks import Masks, prunable
from robustkit.errors import ModelError
from robustkit.params import Schedule


def n_m_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Return a mask like `score` (out, in, ...) that keeps the n highest of every m neighbours along `in`.

    Source: Mishra et al. 2021, arXiv 2104.08378; in a convolution the neighbours are input channels.
    """
    rows = score.movedim(1, -1)
    groups = rows.reshape(-1, m)
    kept = torch.zeros_like(groups).scatter_(1, groups.topk(n, dim=1).indices, 1.0)
    return kept.view(rows.shape).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class NM:
    """Keep the n largest of every m neighbouring input weights, as sparse tensor cores want (Mishra et al. 2021)."""

    pattern: Literal["1:2", "2:4", "1:4", "4:8", "2:8"] = "2:4"

    @property
    def sparsity(self) -> float:
        """The share of zeros in the layers that take the pattern."""
        n, m = self._sizes
        return 1 - n / m

    @property
    def schedule(self) -> Schedule:
        """The pattern is set at once."""
        return "one_shot"

    @property
    def begin(self) -> float:
        """Unused: the pattern is set at once."""
        return 0.0

    @property
    def end(self) -> float:
        """Unused: the pattern is set at once."""
        return 0.0

    @property
    def updates(self) -> int:
        """The pattern is set at once."""
        return 1

    @property
    def _sizes(self) -> tuple[int, int]:
        n, _, m = self.pattern.partition(":")
        return int(n), int(m)

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks of the pattern for every layer whose inputs m divides; the report names the others.

        Raises:
            ModelError: no layer can take the pattern.
        """
        n, m = self._sizes
        fitting = {name: weight for name, weight in prunable(model) if weight.shape[1] % m == 0}
        if not fitting:
            raise ModelError(f"n_m: no layer has inputs in multiples of {m}; take a smaller pattern or other widths")
        left = [name.removesuffix(".weight") for name, _ in prunable(model) if name not in fitting]
        if left:
            context.note(f"n_m: {', '.join(left)} stay dense: their inputs are no multiple of {m}")
        return current.narrowed(
            {
                name: n_m_mask(weight.detach().abs() * current.of(name, weight.detach()), n, m)
                for name, weight in fitting.items()
            }
        )

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Check that no m neighbours hold more than n weights."""
        n, m = self._sizes
        for name, weight in prunable(model):
            if weight.shape[1] % m == 0:
                held = (weight.detach() != 0).movedim(1, -1).reshape(-1, m).sum(1)
                if int(held.max()) > n:
                    raise ModelError(f"n_m: {name} holds more than {n} of {m} neighbouring weights")
