"""One table through which every certificate of robustkit goes: shapes, state, randomness, soundness."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.certificates.certificate import Certificate
from robustkit.evaluation.certified import certified_outcome
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import oracles

CPU = torch.device("cpu")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("interval", {}),
    ("randomized_smoothing", {"n": 30, "n0": 5}),
    ("randomized_smoothing", {"n": 40, "n0": 5, "sigma": 0.1, "alpha": 0.1}),
]


def made(name: str, parameters: dict[str, Any]) -> Certificate:
    clean, mistakes = registry.check_parameters(registry.find("certificate", name), parameters)
    assert not mistakes
    certificate: Certificate = registry.create(registry.find("certificate", name), clean)
    return certificate


def test_every_certificate_is_in_the_table() -> None:
    assert {name for name, _ in CASES} == set(registry.BUILTIN["certificate"])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_a_certificate(name: str, parameters: dict[str, Any], norm: str) -> None:
    torch.manual_seed(0)
    x, y = (values[:40] for values in oracles.digits())
    model = Normalized(nn.Sequential(SmallCnn((1, 8, 8), 10, [4]), nn.Dropout()), [0.3], [0.3])
    before = copy.deepcopy(model.state_dict())
    certificate = made(name, parameters)
    state = torch.get_rng_state()

    def run(eps: float, batch_size: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = certified_outcome(
            model,
            x,
            y,
            certificate,
            Threat(norm, eps),  # type: ignore[arg-type]
            seed=seed,
            label=name,
            batch_size=batch_size,
            device=CPU,
        )
        assert found.certified.shape == found.prediction.shape == found.radius.shape == (40,)
        assert found.certified.dtype == bool
        assert (found.radius >= 0).all()
        assert (found.prediction[found.certified] == y.numpy()[found.certified]).all()
        assert ((found.prediction >= -1) & (found.prediction < 10)).all()
        assert found.forwards > 0
        assert found.rate.n == 40
        return found.certified, found.prediction, found.radius

    small, large = run(0.0)[0], run(0.3)[0]
    assert (large <= small).all(), "a larger ball is harder"
    assert small.any()
    assert all(np.array_equal(one, other) for one, other in zip(run(0.01), run(0.01, batch_size=7), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
