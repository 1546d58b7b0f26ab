"""What every adversarial training asks first: its norm, its eps at this point of the training, its step length."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from robustkit.attacks.threat import Threat
from robustkit.errors import UsageError
from robustkit.train.hooks import Batch, Step


def target_of(batch: Batch) -> Tensor:
    """Return the soft targets (N, classes) of a batch where it has some, else its labels (N,)."""
    return batch.y if batch.target is None else batch.target


def warmed(step: Step, warmup: float) -> tuple[Threat, float]:
    """Return the threat with eps grown linearly over the first `warmup` share of training, and the share of eps.

    The share counts what a curriculum or a guard has taken off the step's threat already.
    """
    grown = min(1.0, step.progress / warmup) if warmup > 0 else 1.0
    return step.threat.scaled(grown), step.ramp * grown


def require_norm(name: str, threat: Threat, norms: Sequence[str]) -> None:
    """Refuse a threat of another norm.

    Raises:
        UsageError: the threat's norm is none of `norms`.
    """
    if threat.norm not in norms:
        raise UsageError(
            f"{name} trains against {' or '.join(norms)}, and the threat is {threat.norm}: "
            f"change `threat: norm`, or use {'pgd_training' if norms == ('linf',) else 'another defense'}"
        )


def step_length(name: str, alpha: float | None, share: float, threat: Threat, ramp: float) -> float:
    """Return the length of a step in pixel units: alpha * ramp where alpha is given, else share * eps of the threat.

    Raises:
        UsageError: alpha is beyond [0, 1] under linf, or not given where eps is one per example.
    """
    if alpha is not None:
        return (checked_alpha(name, alpha) if threat.norm == "linf" else alpha) * ramp
    if not isinstance(threat.eps, int | float):
        raise UsageError(f"{name}: alpha must be given where eps is one per example")
    return share * threat.eps


def checked_alpha(name: str, alpha: float) -> float:
    """Return alpha, a step under linf.

    Raises:
        UsageError: it is beyond 1.
    """
    if alpha > 1:
        raise UsageError(f"{name}: alpha is in [0, 1] pixel units: {alpha:g} was probably meant as {alpha:g}/255")
    return alpha
