"""Fixtures that every test may use: where the real data lies, and one thread count for all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One test process a core: more threads would only wait for each other. Set before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _folder(variable: str) -> Path:
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} is not set")
    path = Path(root)
    if not path.is_dir():
        pytest.fail(f"{variable}={root} is not a folder")
    return path


@pytest.fixture(scope="session")
def cifar10_root() -> Path:
    """Folder with train/<class>/*.jpg and test/<class>/*.jpg."""
    return _folder("ROBUSTKIT_CIFAR10")


@pytest.fixture(scope="session")
def fashion_mnist_root() -> Path:
    """Folder with the four IDX files of Fashion-MNIST, gzipped or not."""
    return _folder("ROBUSTKIT_FASHION_MNIST")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
