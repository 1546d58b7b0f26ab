"""`robustkit.diagnose`: can figures of this model's robustness be believed?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkit.attacks.threat import Threat
from robustkit.errors import UsageError
from robustkit.evaluation.api import Model, as_module, checked_examples
from robustkit.evaluation.attacked import clean_outcome, device_of
from robustkit.evaluation.both import checked_view
from robustkit.evaluation.checks import EXAMPLES, probes
from robustkit.evaluation.compare import finite_flags
from robustkit.evaluation.look import looked_at
from robustkit.models.wrapped import without_gradient
from robustkit.results import Flag

ORDER = ("wrong", "doubt", "note")


@dataclass(repr=False)
class Diagnosis:
    """What the checks saw, the worst first."""

    flags: list[Flag]
    threat: Threat
    examples: int
    """How many images the checks looked at."""

    def __repr__(self) -> str:
        eps = "one eps an example" if isinstance(self.threat.eps, Tensor) else f"eps {self.threat.eps:.4g}"
        counts = {severity: sum(flag.severity == severity for flag in self.flags) for severity in ORDER}
        told = ", ".join(f"{count} {severity}" for severity, count in counts.items() if count) or "no flag is raised"
        lines = [f"diagnosis on {self.examples} images, {self.threat.norm} {eps}: {told}"]
        return "\n".join([*lines, *(f"  {flag.severity} {flag.id}: {flag.message}" for flag in self.flags)])


def diagnose(
    model: Model,
    x: Tensor | NDArray[Any],
    y: Tensor | NDArray[Any],
    threat: Threat,
    *,
    seed: int = 0,
    batch_size: int = 256,
    surrogate: Model | None = None,
) -> Diagnosis:
    """Return whether gradients of a model can be believed: every check that needs no evaluation, in seconds.

    `model` maps images in [0, 1] to logits (N, classes). x (N, ...): floats in [0, 1] or uint8; y (N,): class numbers.
    Clean logits are looked at on all images, `batch_size` at a time, everything else on the first 64. `surrogate`:
    another model, such as the one that this was compressed from, whose adversarial images are tried on it. The model
    and all global generators are left exactly as they were. The checks are those of Carlini et al. 2019 (arXiv
    1902.06705), Athalye et al. 2018 (arXiv 1802.00420) and Pintor et al. 2022 (arXiv 2106.09947).

    Raises:
        UsageError: images outside [0, 1], labels that do not fit.
        ModelError: the model returns no logits, or was made under `torch.inference_mode()`.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    with torch.inference_mode(False):
        images, labels = checked_examples(x, y, threat)
        module = as_module(model)
        device = device_of(module, images.device)
        clean = clean_outcome(module, images, labels, batch_size=batch_size, device=device)
        other = None if surrogate is None else as_module(surrogate)
        seen = checked_view(module, images[:8].to(device)) if without_gradient(module) else module
        flags = [
            *finite_flags({"clean": clean.not_finite}),
            *looked_at(module, images, labels, threat, seed=seed, device=device),
            *probes(seen, images, labels, threat, seed=seed, device=device, surrogate=other),
        ]
    return Diagnosis(sorted(flags, key=lambda one: ORDER.index(one.severity)), threat, min(EXAMPLES, len(labels)))
