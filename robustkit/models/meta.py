"""Building a model without memory for its weights, whatever sizes a file claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

COMPUTED = "torchvision.regnet"
"""Models that compute their widths with tensors and read them, which the meta device cannot do."""
WEIGHTS = frozenset({torch.empty, torch.zeros, torch.ones})


def without_memory(name: str) -> AbstractContextManager[object]:
    """Return the context in which the weights of the model of this name are made on the meta device."""
    return WeightsOnMeta() if name.startswith(COMPUTED) else torch.device("meta")


class WeightsOnMeta(TorchFunctionMode):
    """Makes what weights are made with on the meta device, and leaves other tensors where they are."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call a function of torch's."""
        given = dict(kwargs or {})
        if func in WEIGHTS and given.get("device") is None:
            given["device"] = torch.device("meta")
        return func(*args, **given)
