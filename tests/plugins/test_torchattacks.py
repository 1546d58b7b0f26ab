"""Every class of torchattacks goes through one test."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.attacks.torchattacks import TorchAttack
from robustkit.attacks.torchattacks_table import PROFILES
from robustkit.errors import AttackError, RobustkitError
from robustkit.evaluation.attacked import attack_outcome, clean_outcome, distances
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn

CPU = torch.device("cpu")
EPS = {"linf": 0.2, "l2": 3.0, "l1": 20.0}
QUICK: dict[str, dict[str, Any]] = {
    "SPSA": {"nb_iter": 5, "nb_sample": 16, "lr": 0.05},
    "CW": {"steps": 30, "lr": 0.05},
    "EADL1": {"max_iterations": 20, "binary_search_steps": 2},
    "EADEN": {"max_iterations": 20, "binary_search_steps": 2},
    "DeepFool": {"steps": 10},
    "SparseFool": {"steps": 3},
    "OnePixel": {"steps": 2, "popsize": 4},
    "Pixle": {"restarts": 3, "max_iterations": 3},
    "Square": {"n_queries": 50},
    "PGDRS": {"steps": 3, "noise_type": "gaussian"},
    "PGDRSL2": {"steps": 3, "noise_type": "gaussian"},
    "AutoAttack": {"version": "standard"},
    "JSMA": {"gamma": 0.1},
}
RUNNABLE = sorted(name for name, profile in PROFILES.items() if not profile.refused)
SLOW = {"AutoAttack", "JSMA", "SparseFool", "FAB", "DeepFool"}


class Trained:
    """A small CNN on the real digits, in gray and in colour."""

    def __init__(self, channels: int) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        self.x = torch.from_numpy(found.images / 16).float()[:, None].expand(-1, channels, -1, -1).contiguous()
        self.y = torch.from_numpy(found.target).long()
        torch.manual_seed(0)
        self.model = Normalized(SmallCnn((channels, 8, 8), 10, [8, 16]), [0.3] * channels, [0.4] * channels)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-3)
        for _ in range(60):
            index = torch.randint(1500, (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x[index]), self.y[index]).backward()
            optimizer.step()
        self.model.eval()
        self.model.zero_grad()


@pytest.fixture(scope="module")
def gray() -> Trained:
    return Trained(1)


@pytest.fixture(scope="module")
def colour() -> Trained:
    return Trained(3)


def fitting(name: str, gray: Trained, colour: Trained) -> tuple[Trained, Threat]:
    profile = PROFILES[name]
    norm = profile.norms[0]
    return (colour if profile.channels == 3 else gray), Threat(norm, EPS[norm])  # type: ignore[arg-type]


def frozen_state(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "needs": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        "python": random.getstate(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modes"] == after["modes"]
    assert before["needs"] == after["needs"]
    assert all(one is other for one, other in zip(before["grads"], after["grads"], strict=True))
    assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())
    assert torch.equal(before["torch"], after["torch"])
    assert before["numpy"] == after["numpy"]
    assert before["python"] == after["python"]


def test_the_table_covers_every_class_of_the_library() -> None:
    assert set(PROFILES) == set(registry.torchattacks_files())
    assert len(PROFILES) == 39


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RUNNABLE]
)
def test_every_class_runs_and_leaves_everything_as_it_was(name: str, gray: Trained, colour: Trained) -> None:
    trained, threat = fitting(name, gray, colour)
    x, y = trained.x[1500:1512], trained.y[1500:1512]
    entry = registry.find("attack", f"torchattacks.{name}")
    values, mistakes = registry.check_parameters(entry, QUICK.get(name, {}))
    assert mistakes == []
    attack = registry.create(entry, values)
    before = frozen_state(trained.model)
    clean = clean_outcome(trained.model, x, y, batch_size=8, device=CPU)
    outcome = attack_outcome(
        trained.model,
        x,
        y,
        attack,
        threat,
        clean=clean,
        seed=3,
        label=name,
        batch_size=8,
        device=CPU,
        keep=len(x),
    )
    assert_same(before, frozen_state(trained.model))
    adversarial = outcome.adversarial
    assert adversarial is not None
    assert adversarial.shape == x.shape
    assert adversarial.dtype == torch.float32
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    assert bool((distances(adversarial - x, threat.norm) <= EPS[threat.norm] * (1 + 1e-4) + 1e-6).all())
    assert not bool((outcome.correct & ~clean.correct).any()), "an example that was wrong became right"
    again = attack_outcome(
        trained.model, x, y, attack, threat, clean=clean, seed=3, label=name, batch_size=8, device=CPU
    )
    assert again.correct.tolist() == outcome.correct.tolist()


STRONG = ["PGD", "BIM", "APGD", "MIFGSM", "TPGD", "EOTPGD", "PGDL2", "UPGD", "CW", "Square"]
STRENGTH: dict[str, dict[str, Any]] = {"Square": {"n_queries": 200}, "CW": {"c": 10, "steps": 100, "lr": 0.05}}


@pytest.mark.parametrize("name", STRONG)
def test_attacks_that_should_work_do(name: str, gray: Trained, colour: Trained) -> None:
    trained, threat = fitting(name, gray, colour)
    x, y = trained.x[1500:1540], trained.y[1500:1540]
    clean = clean_outcome(trained.model, x, y, batch_size=64, device=CPU)
    outcome = attack_outcome(
        trained.model,
        x,
        y,
        TorchAttack(name, STRENGTH.get(name, {})),
        threat,
        clean=clean,
        seed=0,
        label=name,
        batch_size=64,
        device=CPU,
    )
    assert outcome.rate.value < clean.rate.value - 0.2


@pytest.mark.parametrize("name", sorted(name for name, profile in PROFILES.items() if profile.refused))
def test_refused_classes_say_why(name: str) -> None:
    with pytest.raises(AttackError, match=f"torchattacks.{name}"):
        TorchAttack(name, {})


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_threat_of_another_norm_is_an_error(name: str, gray: Trained, colour: Trained) -> None:
    trained, _ = fitting(name, gray, colour)
    for norm in {"linf", "l2", "l1"} - set(PROFILES[name].norms):
        with pytest.raises(AttackError, match=f"the threat is {norm}"):
            TorchAttack(name, {})(
                trained.model,
                trained.x[:2],
                trained.y[:2],
                Threat(norm, 0.1),  # type: ignore[arg-type]
                generator=torch.Generator(),
            )


@pytest.mark.parametrize("given", [{"eps": 0.1}, {"norm": "L2"}, {"n_classes": 3}])
def test_what_comes_from_the_threat_cannot_be_given(given: dict[str, Any]) -> None:
    with pytest.raises(RobustkitError, match="comes from the threat"):
        TorchAttack("APGDT", given)
    _, mistakes = registry.check_parameters(registry.find("attack", "torchattacks.APGDT"), given)
    assert mistakes


def test_autoattack_is_labelled() -> None:
    assert "is not AutoAttack" in " ".join(TorchAttack("AutoAttack", {}).notes)


def test_the_note_on_steps_goes_when_steps_are_given() -> None:
    assert any("10 steps" in note for note in TorchAttack("APGD", {}).notes)
    assert not any("10 steps" in note for note in TorchAttack("APGD", {"steps": 100}).notes)


def test_images_with_one_channel_are_refused_where_three_are_needed(gray: Trained) -> None:
    with pytest.raises(AttackError, match="needs 3 channels"):
        TorchAttack("TIFGSM", {})(gray.model, gray.x[:2], gray.y[:2], Threat("linf", 0.1), generator=torch.Generator())


def test_two_classes_are_too_few_for_targets() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(AttackError, match="at least 4 classes"):
        TorchAttack("APGDT", {})(
            model,
            torch.rand(3, 1, 2, 2),
            torch.zeros(3, dtype=torch.long),
            Threat("linf", 0.1),
            generator=torch.Generator(),
        )


class LogSoftmax(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).log_softmax(1)


def test_cw_works_on_log_probabilities(gray: Trained) -> None:
    x, y = gray.x[1500:1540], gray.y[1500:1540]
    found = [
        TorchAttack("CW", STRENGTH["CW"])(model, x, y, Threat("l2", 3.0), generator=torch.Generator().manual_seed(0))
        for model in (gray.model, LogSoftmax(gray.model))
    ]
    with torch.no_grad():
        left = [float((gray.model(one).argmax(1) == y).float().mean()) for one in found]
    # Read as they are, all log-probabilities are negative and the attack's loss has no gradient: it breaks nothing.
    assert left[0] < 0.8
    assert left[1] < 0.8


class DeadGradient(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.detach() + (x - x.detach()) * 0.0)


@pytest.mark.parametrize("name", ["MIFGSM", "NIFGSM", "DIFGSM", "UPGD", "DeepFool", "PGDL2"])
def test_zero_gradients_make_no_success_and_no_nan(name: str, gray: Trained) -> None:
    norm = PROFILES[name].norms[0]
    x, y = gray.x[1500:1506], gray.y[1500:1506]
    found = TorchAttack(name, {"steps": 3})(
        DeadGradient(gray.model),
        x,
        y,
        Threat(norm, 0.01),
        generator=torch.Generator(),  # type: ignore[arg-type]
    )
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("name", ["PGD", "APGD", "Square", "VANILA"])
def test_called_directly_it_leaves_the_mode_alone(name: str, gray: Trained) -> None:
    attack = TorchAttack(name, QUICK.get(name, {}))
    model = copy.deepcopy(gray.model).eval()
    attack(model, gray.x[1500:1504], gray.y[1500:1504], Threat("linf", 0.1), generator=torch.Generator())
    assert not any(module.training for module in model.modules())


def test_channels_last_images_are_taken(gray: Trained) -> None:
    x = gray.x[1500:1504].to(memory_format=torch.channels_last)
    for name in ("PGDL2", "Square"):
        norm = "l2" if name == "PGDL2" else "linf"
        found = TorchAttack(name, {} if name == "PGDL2" else {"n_queries": 10})(
            gray.model,
            x,
            gray.y[1500:1504],
            Threat(norm, 0.5),
            generator=torch.Generator(),  # type: ignore[arg-type]
        )
        assert found.shape == x.shape


def test_no_requests_is_needed() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['requests'] = None\n"
        "import torch\n"
        "from robustkit.attacks.threat import Threat\n"
        "from robustkit.attacks.torchattacks import TorchAttack\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10))\n"
        "x, y = torch.rand(4, 1, 4, 4), torch.arange(4)\n"
        "found = TorchAttack('PGD', {})(model, x, y, Threat('linf', 0.1), generator=torch.Generator())\n"
        "assert found.shape == x.shape and (found - x).abs().max() <= 0.1 + 1e-6\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
