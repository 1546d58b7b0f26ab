"""What is known of a recipe's data before they are read. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from robustkit.recipe.spec import Recipe


@dataclass(frozen=True)
class Facts:
    """Bounds: at most so many classes, channels and pixels a side, at least so many test images."""

    classes: int = 1000
    channels: int = 3
    side: int = 224
    test: int = 1

    @property
    def values(self) -> int:
        """How many numbers an image holds."""
        return self.channels * self.side**2


KNOWN = {
    "digits": Facts(10, 1, 8, 450),
    "mnist": Facts(10, 1, 28, 10_000),
    "fashion_mnist": Facts(10, 1, 28, 10_000),
    "cifar10": Facts(10, 3, 32, 10_000),
    "cifar100": Facts(100, 3, 32, 10_000),
    "svhn": Facts(10, 3, 32, 26_032),
}


def facts_of(recipe: Recipe) -> Facts:
    """Return what is known of a recipe's data; what its source does not say is taken to be large."""
    given = recipe.data.parameters
    facts = KNOWN.get(recipe.data.name, Facts())
    if recipe.data.name == "image_folder":
        channels = 1 if given.get("channels") == "gray" else 3
        facts = replace(facts, classes=_folders(recipe) or facts.classes, channels=channels)
    limits = [bound for bound in (given.get("limit"), recipe.evaluate.examples) if isinstance(bound, int)]
    size = given.get("size")
    return replace(facts, test=min([facts.test, *limits]), side=size if isinstance(size, int) else facts.side)


def _folders(recipe: Recipe) -> int:
    """Return how many folders of images there may be; 0 where there is nothing to count."""
    root = recipe.folder / Path(str(recipe.data.parameters.get("root", ""))).expanduser()
    try:
        with os.scandir(root / "train" if (root / "train").is_dir() else root) as entries:
            return sum(entry.is_dir() for entry in entries)
    except OSError:
        return 0
