"""The last epoch's weights on the test images, beside the best epoch's: what keeping the best one was worth."""

from __future__ import annotations

from typing import Any

from robustkit.models.wrapped import view_of, without_gradient
from robustkit.recipe.plan import Step
from robustkit.results import Flag
from robustkit.seeding import derive_seed
from robustkit.steps.fit import FLOAT, LAST
from robustkit.store import MODEL
from robustkit.train.validate import clean_loss_and_accuracy, robust_accuracy, robust_subset
from robustkit.workbench import Workbench, threat_of


def best_and_last(bench: Workbench, step: Step) -> dict[str, Any]:
    """Return accuracies of both on at most 500 test images, clean and under the validation attack, and a note.

    Nothing where training was not attacked or the best epoch was the last one: they are the same weights then.
    """
    fit = step.parents[0]
    made = bench.store.record(fit) or {}
    rows = made.get("epochs", [])
    if not rows or rows[-1].get("robust") is None or made["best_epoch"] == rows[-1]["epoch"]:
        return {}
    threat, test = threat_of(bench.recipe.variant(step.variant).threat), robust_subset(bench.test())
    found: dict[str, Any] = {"n": len(test)}
    # A quantized model has no gradient, and no last epoch: what it was made of has both.
    best = FLOAT if made.get("quantization") else MODEL
    for which, name in (("best", best), ("last", LAST)):
        model = bench.load(fit, name)
        # What has no gradient is looked at through its view, or nothing would be attacked.
        model = view_of(model) if without_gradient(model) else model
        seed = derive_seed(step.seed, step.key, "last")
        attacked = robust_accuracy(model, test, threat, bench.device, seed=seed)
        clean = clean_loss_and_accuracy(model, test, bench.device)[1]
        found[which] = {"clean": clean, "robust": attacked.robust}
    # Of a vote each member has a best epoch of its own.
    chosen = "each member's own" if made["best_epoch"] is None else f"epoch {made['best_epoch'] + 1}"
    epochs = {"best": chosen, "last": f"epoch {rows[-1]['epoch'] + 1}"}
    parts = [
        f"{which} ({epochs[which]}) {found[which]['clean']:.1%} clean, {found[which]['robust']:.1%} attacked"
        for which in ("best", "last")
    ]
    whose = " of the float model" if best == FLOAT else ""
    message = f"on {len(test)} test images under ten margin steps{whose}: {'; '.join(parts)}; the best one is reported"
    return {"epochs": found, "flags": [Flag(id="best-and-last", severity="note", message=message)]}
