"""Mid-training state: replaced whole, read without running code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from robustkit.checkpoint import StateFile


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    warnings: list[str] = []
    file = StateFile(tmp_path / "state.pt", warnings.append)
    assert file.load() is None
    file.save({"epoch": 3, "weights": {"w": torch.arange(4.0)}})
    state = file.load()
    assert state is not None
    assert state["epoch"] == 3
    assert torch.equal(state["weights"]["w"], torch.arange(4.0))
    assert warnings == []


def test_a_truncated_state_is_said_to_be_broken(tmp_path: Path) -> None:
    warnings: list[str] = []
    file = StateFile(tmp_path / "state.pt", warnings.append)
    file.save({"w": torch.zeros(1000)})
    file.path.write_bytes(file.path.read_bytes()[:500])
    assert file.load() is None
    assert "state.pt" in warnings[0]


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_hostile_state_runs_no_code(tmp_path: Path) -> None:
    warnings: list[str] = []
    target = tmp_path / "owned"
    file = StateFile(tmp_path / "state.pt", warnings.append)
    file.path.write_bytes(pickle.dumps(_Hostile(target), protocol=2))
    assert file.load() is None
    assert not target.exists()
    assert warnings
