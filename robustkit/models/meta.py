"""Building a model without memory for its weights, whatever sizes a file claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from robustkit.errors import ModelError

COMPUTED = "torchvision.regnet"
"""Models that compute their widths with tensors and read them, which the meta device cannot do."""
SPARE = 8
"""So many times more weights may be made than are kept."""
WEIGHTS = frozenset({torch.empty, torch.zeros, torch.ones})


def without_memory(name: str) -> AbstractContextManager[object]:
    """Return the context in which the weights of the model of this name are made on the meta device."""
    return WeightsOnMeta() if name.startswith(COMPUTED) else torch.device("meta")


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Stop the making of a model that goes far beyond so many weights: even on the meta device layers take memory.

    Raises:
        ModelError: it does; models may make some weights twice, or make ones that they do not keep.
    """
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += 1
        if made > SPARE * tensors + SPARE:
            raise ModelError(f"it has far more layers than the {tensors} tensors that the file holds")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


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
