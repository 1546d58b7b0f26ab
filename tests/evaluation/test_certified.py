"""The lower bound beside the upper one: what Python offers, and the error where the two contradict each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustkit
from robustkit.attacks.threat import Threat
from robustkit.certificates.certificate import Certified
from robustkit.errors import InternalError, UsageError
from robustkit.evaluation.certified import check_sound, make_certificates

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import oracles

THREAT = Threat("linf", 0.05)


class Everything:
    """Certifies every example, whatever it is."""

    smoothed: ClassVar[bool] = False

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator
    ) -> Certified:
        return Certified(torch.ones(len(y), dtype=torch.bool), y, torch.ones(len(y)))


class EverythingSmoothed(Everything):
    """Certifies another classifier than the model."""

    smoothed: ClassVar[bool] = True


def data(count: int = 100) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = oracles.digits()
    return oracles.softmax_regression(), x[:count], y[:count]


def test_a_certificate_that_an_attack_contradicts_is_an_internal_error() -> None:
    model, x, y = data()
    attacked = robustkit.evaluate(model, x, y, threat=THREAT, attacks=["pgd"])
    first = int(np.flatnonzero(~attacked.correct)[0])
    with pytest.raises(
        InternalError, match=rf"everything certifies \d+ examples that pgd breaks .*from 0: .*\b{first}\b"
    ):
        robustkit.certify(model, x, y, threat=THREAT, certificates=[Everything()], against=attacked)
    sound = robustkit.certify(model, x, y, threat=THREAT, certificates=["interval"], against=attacked)
    assert sound.certified["interval"].value <= attacked.worst.value


def test_an_image_that_is_wrong_by_itself_contradicts_too() -> None:
    model, x, y = data()
    with pytest.raises(InternalError, match="clean breaks"):
        robustkit.certify(model, x, (y + 1) % 10, threat=THREAT, certificates=[Everything()])


def test_a_smoothed_classifier_is_not_contradicted_by_attacks_on_the_model() -> None:
    model, x, y = data()
    attacked = robustkit.evaluate(model, x, y, threat=THREAT, attacks=["pgd"])
    found = robustkit.certify(model, x, y, threat=THREAT, certificates=[EverythingSmoothed()], against=attacked)
    assert found.certified["everythingsmoothed"].value == 1
    assert "of the smoothed classifier" in repr(found)


def test_at_most_ten_examples_are_named() -> None:
    proven, right = np.ones(30, dtype=bool), np.zeros(30, dtype=bool)
    with pytest.raises(InternalError) as caught:
        check_sound({"interval": proven}, {"pgd": right})
    assert "30 examples" in str(caught.value)
    assert "8, 9, ..." in str(caught.value)
    check_sound({"interval": right}, {"pgd": proven, "fgsm": right})
    check_sound({}, {"pgd": right})


def test_an_evaluation_of_something_else_is_refused() -> None:
    model, x, y = data()
    for threat, images in ((Threat("linf", 0.1), x), (Threat("l2", 0.05), x), (THREAT, x[:50])):
        other = robustkit.evaluate(model, images, y[: len(images)], threat=threat, attacks=["noise"])
        with pytest.raises(UsageError, match="against"):
            robustkit.certify(model, x, y, threat=THREAT, against=other)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["intervall"], "did you mean 'interval'"),
        ([{"randomized_smoothing": {"sigmaa": 1}}], "did you mean 'sigma'"),
        ([{"randomized_smoothing": {"alpha": 0}}], "alpha"),
        ([{"randomized_smoothing": {"alpha": 1}}], "alpha"),
        ([{"randomized_smoothing": {"sigma": -1}}], "sigma"),
        (["interval", "interval"], "two certificates are called 'interval'"),
        ([{"interval": {}, "randomized_smoothing": {}}], "one name each"),
        ([3], "is no certificate"),
    ],
)
def test_mistakes(specs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_certificates(specs)


def test_labels_and_batches() -> None:
    model, x, y = data()
    found = robustkit.certify(
        model, x.numpy(), y.numpy(), threat=THREAT, batch_size=7, certificates=["interval", {"interval": {"as": "ibp"}}]
    )
    assert list(found.certified) == ["interval", "ibp"]
    whole = robustkit.certify(model, x, y, threat=THREAT, certificates="interval")
    assert np.array_equal(found.outcomes["ibp"].certified, whole.outcomes["interval"].certified)


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10)).train()
    _, x, y = data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    robustkit.certify(
        model, x, y, threat=THREAT, certificates=["interval", {"randomized_smoothing": {"n": 5, "n0": 2}}]
    )
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
