"""Gradient checkpointing: a model's blocks keep their inputs alone and are computed again in the backward.

Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from robustkit.defenses.frozen import FrozenConvolutions
from robustkit.errors import UsageError
from robustkit.recipe.spec import TrainSpec
from robustkit.train.modes import buffers_of, copied, put_buffers

LEAST = 2
"""A chain of so many blocks or more is worth it."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that are computed again: the children, with weights, of the outermost chains of a model.

    A chain is an nn.Sequential or nn.ModuleList with two such children or more. A model without any has no blocks.
    """
    if isinstance(model, nn.Sequential | nn.ModuleList):
        children = [child for child in model if any(True for _ in child.parameters())]
        if len(children) >= LEAST:
            return children
    return [block for child in model.children() for block in blocks_of(child)]


def chosen_blocks(model: nn.Module, spec: TrainSpec) -> list[nn.Module]:
    """Return the blocks that a training computes again; none without `checkpointing`.

    Raises:
        UsageError: the model has none, or it is to be compiled too.
    """
    if not spec.checkpointing:
        return []
    if spec.compile is not False:
        raise UsageError("train.checkpointing and train.compile cannot go together; drop one of them")
    found = blocks_of(model)
    if not found:
        raise UsageError(
            "train.checkpointing: the model has no chain of blocks (nn.Sequential or nn.ModuleList) to compute again; "
            "drop `checkpointing`"
        )
    return found


@contextmanager
def checkpointed(model: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """Let the blocks of a model be computed again in backwards of what is computed meanwhile; values stay the same.

    Dropout draws the same masks again, and batch norms count each batch once.
    """
    try:
        for block in blocks:
            block.forward = _again(block, block.forward)
        yield
    finally:
        for block in blocks:
            # What is on the instance hides the class's own.
            block.__dict__.pop("forward", None)


class _AsBefore:
    """Puts a block into the modes and gives it the buffers that it had when this was made; may be entered often.

    A block is computed again later: by then a penalty's eval mode is over, and batch norms' statistics and the vectors
    of a spectral norm have moved on. What the repetition changes in them is dropped, as it was counted the first time.
    """

    def __init__(self, block: nn.Module) -> None:
        self._modes = [(module, module.training) for module in block.modules()]
        self._block, self._buffers = block, copied(buffers_of(block))
        self._left: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for module, training in self._modes:
                stack.callback(setattr, module, "training", module.training)
                module.training = training
            stack.callback(put_buffers, buffers_of(self._block))
            put_buffers(copied(self._buffers))
            stack.enter_context(FrozenConvolutions(fold=False, again=True))
            self._left.append(stack.pop_all())

    def __exit__(self, *error: object) -> None:
        self._left.pop().close()


def _again(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        # A mode that was entered outside does not reach into a backward: both passes have it, or they would differ.
        return FrozenConvolutions(fold=False, again=True), _AsBefore(block)

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run
