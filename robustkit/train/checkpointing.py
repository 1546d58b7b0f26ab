"""Gradient checkpointing: a model's blocks keep their inputs alone and are computed again in the backward.

Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from robustkit.defenses.thin import ThinInputs
from robustkit.errors import UsageError
from robustkit.recipe.spec import TrainSpec

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


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let batch norms compute as before and leave their running statistics: the batch has been counted."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, _, tracked in kept:
            # Without momentum nothing moves; without a buffer nothing counts.
            norm.momentum = 0.0
            norm.num_batches_tracked = None if tracked is None else tracked.clone()
        yield
    finally:
        for norm, momentum, tracked in kept:
            norm.momentum, norm.num_batches_tracked = momentum, tracked


@contextmanager
def _once_more(block: nn.Module) -> Iterator[None]:
    with ThinInputs(), _statistics_kept(block):
        yield


def _again(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        # A mode that was entered outside does not reach into a backward: both passes have it, or they would differ.
        return ThinInputs(), _once_more(block)

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run
