"""How each kind of step is done. A step reads the store through the workbench and marks itself as done there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from robustkit.recipe.plan import Kind, Step
from robustkit.steps.artefact import artefact_step
from robustkit.steps.audit import audit_step
from robustkit.steps.bounds import certify_step, corruptions_step, soundness_step
from robustkit.steps.evaluate import attack_step, checks_step, clean_step, curve_step, measure_step
from robustkit.steps.fit import fit_step
from robustkit.steps.latency import latency_step
from robustkit.steps.poisoned import success_step, tolerance_step
from robustkit.workbench import Workbench

STEPS: Mapping[Kind, Callable[[Workbench, Step], None]] = {
    "fit": fit_step,
    "measure": measure_step,
    "clean": clean_step,
    "attack": attack_step,
    "curve": curve_step,
    "checks": checks_step,
    "latency": latency_step,
    "artefact": artefact_step,
    "audit": audit_step,
    "certify": certify_step,
    "soundness": soundness_step,
    "corruptions": corruptions_step,
    "success": success_step,
    "tolerance": tolerance_step,
}
