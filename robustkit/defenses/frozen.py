"""A model as attacks in training see it: its parameters frozen, so that its passes can be computed in quicker ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from robustkit.defenses.folding import Convolution, Folding, as_convolution, as_norm
from robustkit.defenses.thin import is_thin, thin_convolution
from robustkit.train.modes import attack_mode, is_replaced

Logits = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> logits (N, classes)."""


class FrozenConvolutions(TorchFunctionMode):
    """While it is entered, for one pass of a model, convolutions with frozen filters are computed in quicker ways.

    Over images of few channels on the CPU they take their input gradient as `thin` has it. With `fold`, batch norms in
    eval mode are folded into them from the second pass on. The numbers are the usual ones up to rounding. Others than
    `torch.conv2d` with positional arguments are left as they were, and so is what is compiled, or computed again in
    the backward (torch.utils.checkpoint), unless this is entered there too: `again` says that it is.
    """

    def __init__(self, *, fold: bool, again: bool = False) -> None:
        super().__init__()
        self.folding = Folding() if fold else None
        self._again = again

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Replace convolutions, and batch norms that are folded into them."""
        given = kwargs or {}
        left = torch.compiler.is_compiling() or (not self._again and _saves_in_another_way())
        norm = as_norm(*args, **given) if func is functional.batch_norm and not left else None
        if self.folding is not None and norm is not None and self.folding.takes(args[0], norm):
            return args[0]
        if self.folding is not None and norm is None:
            self.folding.look_at(func, args, given)
        call = as_convolution(*args) if func is torch.conv2d and not given and not left else None
        return func(*args, **given) if call is None else self._convolve(call)

    def _convolve(self, call: Convolution) -> Tensor:
        if self.folding is None:
            return _run(call)
        return self.folding.watched(call, _run)


class FrozenModel:
    """The logits of a model in attack mode, by `FrozenConvolutions`; made for one attack, called once a pass."""

    def __init__(self, model: nn.Module, *, fold: bool = True) -> None:
        self._model = model
        # What is computed again in the backward is so without this mode around it, and what is compiled would keep the
        # filters of the first attack.
        self._convolutions = FrozenConvolutions(fold=fold and not is_replaced(model))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images x (N, C, H, W)."""
        if not torch.is_grad_enabled():
            plain: Tensor = self._model(x)
            return plain
        with self._convolutions as mode:
            logits: Tensor = self._model(x)
        if mode.folding is None or mode.folding.ended_well():
            return logits
        del logits  # and with them what they keep for a backward
        self._convolutions = FrozenConvolutions(fold=False)
        return self(x)


@contextmanager
def frozen(model: nn.Module, *, passes: int) -> Iterator[FrozenModel]:
    """Put the model into attack mode and yield what the passes of one attack, so many of them, go through."""
    with attack_mode(model):
        yield FrozenModel(model, fold=passes > 1)


def _saves_in_another_way() -> bool:
    """Say whether hooks decide what is kept for the backward, as where it is to be computed again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _run(call: Convolution) -> Tensor:
    return thin_convolution(call) if is_thin(call) else call.plain()
