"""The gallery of a run, from what the attack steps stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from robustkit.evaluated import Evaluated
from robustkit.per_example import GALLERY, write_gallery


@dataclass
class Stored:
    """A store with one gallery."""

    folder: Path
    arrays: dict[str, Any]

    def read_arrays(self, key: str, name: str) -> dict[str, Any]:
        assert (key, name) == ("key", GALLERY)
        return self.arrays


@pytest.mark.parametrize(("norm", "expected"), [("linf", 0.4), ("l2", 0.5), ("l1", 0.7)])
def test_the_gallery_measures_a_change_in_the_norm_of_the_threat(norm: str, expected: float, tmp_path: Path) -> None:
    clean = np.zeros((2, 1, 2, 2), dtype=np.uint8)
    adversarial = np.zeros((2, 1, 2, 2), dtype=np.float32)
    adversarial[:, 0, 0] = [0.3, 0.4]
    arrays = {
        "clean": clean,
        "adversarial": adversarial,
        "label": np.zeros(2, dtype=np.int64),
        "prediction_clean": np.zeros(2, dtype=np.int64),
        "prediction_adversarial": np.ones(2, dtype=np.int64),
        "confidence_clean": np.ones(2, dtype=np.float32),
        "confidence_adversarial": np.ones(2, dtype=np.float32),
    }
    plan: Any = SimpleNamespace(
        recipe=SimpleNamespace(threat=SimpleNamespace(norm=norm)),
        attack_step=lambda variant, seed, label: SimpleNamespace(key="key"),
    )
    store: Any = Stored(tmp_path, arrays)
    name = write_gallery(plan, store, Evaluated("v", 0, attacks={"pgd": {"files": [GALLERY]}}))
    assert name is not None
    with np.load(tmp_path / name) as found:
        assert np.allclose(found["norm"], expected)
