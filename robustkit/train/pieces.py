"""Gradient accumulation: a batch in pieces, whose weighted gradients add up to the whole batch's."""

from __future__ import annotations

from torch import Tensor

from robustkit.errors import UsageError
from robustkit.recipe.spec import WHOLE_BATCH_HOOKS
from robustkit.train.hooks import Batch, Defense
from robustkit.train.state import Named

Piece = tuple[Batch, Tensor | float]
"""Some images of a batch, and their share of its loss."""


def pieces(batch: Batch, count: int) -> list[Piece]:
    """Return a batch in `count` pieces (fewer where they would be single images), each with its share of the loss.

    The share is that of the images, or of their weights where the batch has weights.
    """
    if count == 1:
        return [(batch, 1.0)]
    images = len(batch.y)
    # Two images at least: batch norm cannot be trained on a single one.
    count = max(1, min(count, images // 2))
    ends = [images * number // count for number in range(count + 1)]
    return [_piece(batch, slice(*ends[number : number + 2])) for number in range(count)]


def _piece(batch: Batch, part: slice) -> Piece:
    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[part]

    piece = Batch(
        batch.x[part],
        batch.y[part],
        batch.index[part],
        batch.classes,
        target=cut(batch.target),
        weight=cut(batch.weight),
        x_adv=cut(batch.x_adv),
    )
    if batch.weight is None or piece.weight is None:
        return piece, len(piece.y) / len(batch.y)
    return piece, piece.weight.sum() / batch.weight.sum()


def check_pieces(accumulate: int, defenses: Named) -> None:
    """Look for defenses that need the whole batch at once.

    Raises:
        UsageError: there is one, and the batch is parted.
    """
    if accumulate == 1:
        return
    whole = [type(defense).__name__ for _, defense in defenses if _needs_all(defense)]
    if whole:
        raise UsageError(
            f"train.accumulate: {whole[0]} looks at the whole batch at once, and accumulate parts it; drop "
            "`accumulate` or that defense"
        )


def _needs_all(defense: Defense) -> bool:
    return any(getattr(type(defense), hook) is not getattr(Defense, hook) for hook in WHOLE_BATCH_HOOKS)
