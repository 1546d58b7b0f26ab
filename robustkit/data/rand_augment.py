"""RandAugment on whole batches: torchvision's operations, on the device, by a generator of the caller's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from robustkit.params import Magnitude, PositiveInt


def rand_augment(images: Tensor, operations: int, magnitude: int, groups: int, generator: torch.Generator) -> Tensor:
    """Return each image after `operations` random operations of a strength (RandAugment, Cubuk et al. 2020).

    images: (N, C, H, W), uint8 or float in [0, 1]; the result is of the same kind. magnitude: 0 to 30. torchvision
    draws one series of operations a call, so the batch is cut into `groups`, each with a series of its own: shuffled
    batches make a group a random one. Empty places become black.
    """
    transform = v2.RandAugment(num_ops=operations, magnitude=magnitude)
    # torchvision draws on the CPU by the global generator: it gets a seed from ours, and is put back afterwards.
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed: list[Tensor] = [transform(group) for group in images.chunk(groups)]
    found = torch.cat(changed)
    return found.clamp(0, 1) if found.is_floating_point() else found


@dataclass(frozen=True)
class RandAugment:
    """Random shifts, rotations, colour and contrast changes (RandAugment, Cubuk et al. 2020; torchvision's operations).

    operations: how many in a row; magnitude: their strength, 0 to 30; groups: into how many parts with operations of
    their own a batch is cut.
    """

    operations: PositiveInt = 2
    magnitude: Magnitude = 9
    groups: PositiveInt = 16

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the changed batch."""
        return rand_augment(images, self.operations, self.magnitude, self.groups, generator)
