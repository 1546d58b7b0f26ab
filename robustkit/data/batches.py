"""Training batches: from tensors on the device, or streamed where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from robustkit.data.augment import Augmentation, Place, augmented
from robustkit.data.split import Split

Sample = tuple[Tensor, Tensor, Tensor]


def epoch_order(count: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """Return positions (count,) of one epoch on the CPU: a permutation, or draws with replacement by weight."""
    if weights is None:
        return torch.randperm(count, generator=generator)
    return torch.multinomial(weights.cpu().to(torch.float64), count, replacement=True, generator=generator)


def resident(split: Split, device: torch.device, memory_limit: int | None) -> Split:
    """Return the split on the device, or where it is when it is larger than `memory_limit` bytes (then streamed)."""
    return split if is_streamed(split, memory_limit) else split.to(device)


def is_streamed(split: Split, memory_limit: int | None) -> bool:
    """Say whether the images take more than `memory_limit` bytes."""
    return memory_limit is not None and split.images.numel() > memory_limit


def training_batches(
    split: Split,
    order: Tensor,
    batch_size: int,
    device: torch.device,
    augment: Sequence[Augmentation],
    generator: torch.Generator,
    *,
    memory_limit: int | None = None,
    epoch: int = 0,
    seed: int = 0,
) -> Iterator[Sample]:
    """Yield (x float32 (B, C, H, W) in [0, 1], y (B,), positions (B,)) on the device, in the order given.

    A last batch of one example is left out (batch norm cannot be trained on it), unless it is the only one. The
    numbers are the same whether the data are resident or streamed. `epoch` and `seed`, the same in every epoch, are for
    augmentations that follow an image through the training.
    """
    source = _streamed if is_streamed(split, memory_limit) else _resident
    for images, labels, positions in source(split, _drop_single(order, batch_size), batch_size, device):
        x = images.to(torch.float32).div_(255)
        yield augmented(x, augment, Place(epoch, seed, positions), generator), labels, positions


def _drop_single(order: Tensor, batch_size: int) -> Tensor:
    return order[:-1] if len(order) > batch_size and len(order) % batch_size == 1 else order


def _resident(split: Split, order: Tensor, batch_size: int, device: torch.device) -> Iterator[Sample]:
    order = order.to(split.images.device)
    for index in order.split(batch_size):
        images, labels = split.images[index], split.labels[index]
        yield images.to(device), labels.to(device), index.to(device)


def _streamed(split: Split, order: Tensor, batch_size: int, device: torch.device) -> Iterator[Sample]:
    data = TensorDataset(split.images, split.labels, torch.arange(len(split)))
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(
        data, batch_size=batch_size, sampler=order.tolist(), pin_memory=device.type == "cuda"
    )
    for images, labels, index in loader:
        yield (
            images.to(device, non_blocking=True),
            labels.to(device, non_blocking=True),
            index.to(device, non_blocking=True),
        )
