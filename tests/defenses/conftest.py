"""Real digits as a split, and small models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from robustkit.data.split import Split, split_of
from robustkit.train.hooks import DataContext


@dataclass
class Log:
    """What a data defense logged, by message."""

    entries: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def __call__(self, message: str, numbers: Mapping[str, Any]) -> None:
        self.entries.append((message, numbers))

    def about(self, word: str) -> Mapping[str, Any]:
        return next(numbers for message, numbers in self.entries if word in message)


@pytest.fixture(scope="session")
def digits() -> Split:
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    return split_of(images, torch.from_numpy(bunch.target))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def context(log: Log) -> Callable[..., DataContext]:
    def make(test: Split | None = None, features: Callable[[Split], Tensor] | None = None) -> DataContext:
        return DataContext(
            generator=torch.Generator().manual_seed(0),
            device=torch.device("cpu"),
            log=log,
            features=features or (lambda split: split.floats(0, len(split)).flatten(1)),
            test=test,
        )

    return make
