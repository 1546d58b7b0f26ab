"""Exact and near duplicates among images, found in blocks of tensor operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2048
_PAIRS = 1 << 16
_COARSE = 16
_FINE = 32
NONE = -1


def exact_matches(images: Tensor, among: Tensor | None = None) -> Tensor:
    """Return for each uint8 image (N, C, H, W) the position (N,) of a byte-identical one, or -1.

    Without `among` that is the first earlier image; with it, the first identical image of `among` (M, C, H, W).
    Images are hashed a block at a time, and equal hashes are confirmed byte by byte.
    """
    reference = images if among is None else among
    if len(images) == 0 or len(reference) == 0:
        return torch.full((len(images),), NONE, dtype=torch.int64, device=images.device)
    keys, order = torch.sort(hashes(reference), stable=True)
    wanted = hashes(images)
    # A stable sort puts the first of the equal ones at the left end of its run.
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    candidate = order[place]
    found = keys[place] == wanted
    if among is None:
        found &= candidate < torch.arange(len(images), device=images.device)
    rows = found.nonzero().squeeze(1)
    for chunk in torch.split(rows, _PAIRS):
        same = (images[chunk] == reference[candidate[chunk]]).flatten(1).all(1)
        found[chunk] = same
    return torch.where(found, candidate, torch.full_like(candidate, NONE))


def hashes(images: Tensor) -> Tensor:
    """Return a 64-bit number (N,) of each uint8 image (N, C, H, W): of its bytes alone, and the same everywhere."""
    flat = images.flatten(1)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=generator).to(flat.device)
    # Sums wrap around modulo 2**64, which is what a linear hash needs.
    return torch.cat([(block.to(torch.int64) * factors).sum(1) for block in torch.split(flat, _BLOCK)])


def signatures(images: Tensor, *, side: int, device: torch.device | None = None) -> Tensor:
    """Return one unit vector (N, D) for each uint8 image (N, C, H, W): shrunk to at most side x side, mean taken off.

    The cosine of two signatures is the correlation of the shrunk images, so brightness and contrast do not count.
    An image of one flat colour has the zero vector, which resembles nothing. The result lies on `device`.
    """
    device = images.device if device is None else device
    height, width = min(side, images.shape[2]), min(side, images.shape[3])
    parts = []
    for block in torch.split(images, _BLOCK):
        small = F.interpolate(block.to(device, torch.float32), (height, width), mode="area")
        flat = small.flatten(1)
        parts.append(F.normalize(flat - flat.mean(1, keepdim=True), dim=1, eps=1e-3))
    return torch.cat(parts) if parts else torch.zeros(0, images.shape[1] * height * width, device=device)


def near_matches(signature: Tensor, similarity: float, among: Tensor | None = None) -> Tensor:
    """Return for each signature (N, D) the position (N,) of the most similar one at or above `similarity`, or -1.

    Without `among` only earlier signatures count; with it, those of `among` (M, D).
    """
    reference = signature if among is None else among
    found = torch.full((len(signature),), NONE, dtype=torch.int64, device=signature.device)
    for start in range(0, len(signature), _BLOCK):
        stop = min(start + _BLOCK, len(signature))
        earlier = reference if among is not None else reference[:stop]
        if len(earlier) == 0:
            continue
        cosine = signature[start:stop] @ earlier.T
        if among is None:
            own = cosine[:, start:stop]
            own.masked_fill_(torch.ones_like(own, dtype=torch.bool).triu(), -2.0)
        best, position = cosine.max(1)
        found[start:stop] = torch.where(best >= similarity, position, found[start:stop])
    return found


def directions(features: Tensor, mean: Tensor) -> Tensor:
    """Return features (N, D) without their mean (D,) as unit vectors: what two examples differ in, not share."""
    return F.normalize(features.to(torch.float32) - mean, dim=1)


@dataclass(frozen=True)
class Duplicates:
    """What was found: `of` (N,), the position of the image that each one repeats, or -1; `exact` (N,) bool."""

    of: Tensor
    exact: Tensor

    @property
    def repeated(self) -> Tensor:
        """Bool (N,): the image repeats another one."""
        return self.of >= 0

    def with_near(self, of: Tensor) -> Duplicates:
        """Return these and, for images that repeat none yet, those of another search: positions (N,) or -1."""
        return Duplicates(torch.where(self.of >= 0, self.of, of.to(self.of.device)), self.exact)


def find_duplicates(
    images: Tensor, *, similarity: float | None, among: Tensor | None = None, device: torch.device | None = None
) -> Duplicates:
    """Find images (N, C, H, W, uint8) that repeat an earlier one, or one of `among`.

    similarity: correlation from which two images count as the same, or None for byte-identical ones alone. The most
    similar image is looked up among images shrunk to 16 x 16, and must hold at up to 32 x 32 as well: shrunk further,
    different objects of one outline look the same. The first image of a group never counts as a repetition.
    The comparisons run on `device`, a block at a time; images and results stay where the images are.
    """
    exact = exact_matches(images, among)
    if similarity is None:
        return Duplicates(exact, exact >= 0)
    reference = images if among is None else among
    others = None if among is None else signatures(among, side=_COARSE, device=device)
    near = near_matches(signatures(images, side=_COARSE, device=device), similarity, others).to(images.device)
    rows = (near >= 0).nonzero().squeeze(1)
    for chunk in torch.split(rows, _PAIRS):
        fine = signatures(images[chunk], side=_FINE) * signatures(reference[near[chunk]], side=_FINE)
        near[chunk] = torch.where(fine.sum(1) >= similarity, near[chunk], NONE)
    return Duplicates(torch.where(exact >= 0, exact, near), exact >= 0)
