"""Every attack of torchattacks 3.5.1 behind one adapter that keeps its traps from the user."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.attacks.torchattacks_table import EAD, EAD_LEAST, FIXED_BY_ROBUSTKIT, NORMS, PROFILES
from robustkit.errors import AttackError, UsageError, did_you_mean

INSIDE = 1e-6
ITERATION_ARGUMENTS = ("steps",)


class FrozenLogits(nn.Module):
    """A model as torchattacks needs it: contiguous float32 in, float32 logits out, a parameter to tell the device.

    `positive`: each example's logits are shifted so that the smallest is 1. No difference between logits changes, but
    losses that multiply logits by a one-hot mask and take the maximum (CW, UPGD) read them right.
    """

    def __init__(self, model: nn.Module, device: torch.device, positive: bool) -> None:
        super().__init__()
        self.model = model
        self.positive = positive
        # torchattacks leaves the model in training mode where it finds this wrapper in it.
        self.training = model.training
        self.place = nn.Parameter(torch.zeros((), device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        logits: Tensor = self.model(x.float().contiguous()).float()
        return logits - logits.detach().amin(1, keepdim=True) + 1 if self.positive else logits


class TorchAttack:
    """One torchattacks class with its parameters; the budget comes from the threat at each call.

    Raises:
        UsageError: unknown class, or a parameter that comes from the threat or the model.
        AttackError: the class is refused; the message says why and what to use.
    """

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        if name not in PROFILES:
            raise UsageError(f"unknown attack 'torchattacks.{name}'; {did_you_mean(name, PROFILES) or 'see the docs'}")
        self.name = name
        self.parameters = dict(parameters)
        self.profile = PROFILES[name]
        if self.profile.refused:
            raise AttackError(self.profile.refused)
        taken = sorted(FIXED_BY_ROBUSTKIT & set(self.parameters))
        if taken:
            raise UsageError(
                f"torchattacks.{name}: {', '.join(taken)} comes from the threat and the model; leave it out"
            )
        if name in EAD and self.parameters.get("max_iterations", 100) < EAD_LEAST:
            raise UsageError(f"torchattacks.{name}: max_iterations must be at least {EAD_LEAST}")
        if self.parameters.get("noise_type") == "gaussian":
            # torchattacks spells it so.
            self.parameters["noise_type"] = "guassian"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results has to know about this attack."""
        steps_given = any(name in self.parameters for name in ITERATION_ARGUMENTS)
        return tuple(note for note in self.profile.notes if not (steps_given and note.startswith("10 steps")))

    @property
    def minimum_norm(self) -> bool:
        """Whether results beyond eps are to be expected (they do not count)."""
        return self.profile.budget != "fixed"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return what the attack made of x (N, C, H, W) in [0, 1]; rows that are not finite come back clean.

        Raises:
            AttackError: the threat, the classes or the channels do not fit this attack, or it failed.
        """
        self._check(x, threat)
        wrapped = FrozenLogits(model, x.device, self.profile.positive_logits)
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        with _isolated(seed, x.device), torch.enable_grad():
            with torch.no_grad():
                classes = wrapped(x[:1]).shape[1]
            self._check_classes(classes)
            found = self._attack(wrapped, x.contiguous(), y, threat, classes, seed)
        finite = torch.isfinite(found.flatten(1)).all(1)
        return torch.where(finite.view(-1, 1, 1, 1), found, x).clamp(0, 1)

    def _check(self, x: Tensor, threat: Threat) -> None:
        label, profile = f"torchattacks.{self.name}", self.profile
        if threat.norm not in profile.norms:
            raise AttackError(f"{label} works under {', '.join(profile.norms)}; the threat is {threat.norm}")
        if isinstance(threat.eps, Tensor) and threat.eps.numel() > 1 and bool((threat.eps != threat.eps[0]).any()):
            raise AttackError(f"{label} takes one eps for all examples; use pgd for an eps of each example's own")
        if x.dim() != 4:
            raise AttackError(f"{label} takes images (N, C, H, W), not {tuple(x.shape)}; use pgd or fgsm")
        if profile.channels is not None and x.shape[1] != profile.channels:
            raise AttackError(f"{label} needs {profile.channels} channels, the images have {x.shape[1]}; use pgd")

    def _check_classes(self, classes: int) -> None:
        least = 3 if self.parameters.get("loss") == "dlr" else self.profile.min_classes
        if classes < least:
            raise AttackError(
                f"torchattacks.{self.name} needs at least {least} classes, the model has {classes}; use pgd"
            )

    def _arguments(self, threat: Threat, classes: int, seed: int) -> dict[str, Any]:
        arguments = dict(self.parameters)
        eps = float(threat.eps.flatten()[0]) if isinstance(threat.eps, Tensor) else float(threat.eps)
        if self.profile.eps_argument:
            arguments[self.profile.eps_argument] = eps
        if self.profile.norm_argument:
            arguments["norm"] = NORMS[threat.norm]
        if self.profile.classes_argument:
            # As the original: at most the nine best other classes are targets.
            arguments["n_classes"] = min(classes, 10)
        if self.profile.seed_argument:
            arguments.setdefault("seed", seed)
        return arguments

    def _attack(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, classes: int, seed: int) -> Tensor:
        attack = self._make(model, self._arguments(threat, classes, seed))
        attack.device = x.device
        labels = y
        if self.name == "JSMA" and classes != 10:
            # Its untargeted mode aims at (label + 1) % 10, whatever the number of classes.
            attack.set_mode_targeted_by_label(quiet=True)
            labels = (y + 1) % classes
        images = x.clamp(INSIDE, 1 - INSIDE) if self.profile.open_box else x.clone()
        size = 1 if self.parameters.get("update_each_iteration") else len(x)
        try:
            parts = [
                attack(one.clone(), label.clone()).detach().float()
                for one, label in zip(images.split(size), labels.split(size), strict=True)
            ]
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError, TypeError, UnboundLocalError) as error:
            raise AttackError(f"torchattacks.{self.name} failed: {type(error).__name__}: {error}; use pgd") from error
        return torch.cat(parts)

    def _make(self, model: nn.Module, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchattacks
        try:
            return getattr(torchattacks, self.name)(model, **arguments)
        except (TypeError, ValueError) as error:
            raise UsageError(f"torchattacks.{self.name}: {error}") from error


@contextmanager
def _isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators for a library that draws from them, and put them back."""
    devices = [device] if device.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
