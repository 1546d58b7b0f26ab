"""The step that lets AutoAttack have a look at what the recipe's attacks left."""

from __future__ import annotations

from robustkit import stats
from robustkit.evaluation.audit import audit
from robustkit.recipe.plan import Step
from robustkit.seeding import derive_seed
from robustkit.steps.evaluate import OUTCOME
from robustkit.store import Partial
from robustkit.workbench import Workbench, threat_of


def audit_step(bench: Workbench, step: Step) -> None:
    """Store how many of a random subset of the survivors AutoAttack-standard breaks."""
    fit, *judged = step.parents
    test = bench.test()
    found = audit(
        bench.model(fit),
        test.images,
        test.labels,
        threat_of(bench.recipe.threat),
        survivors=stats.worst_case(bench.store.read_arrays(key, OUTCOME)["correct"] for key in judged),
        count=bench.recipe.evaluate.audit,
        seed=derive_seed(step.seed, step.key),
        batch_size=bench.recipe.evaluate.batch_size,
        device=bench.device,
        quantize_input=bench.recipe.evaluate.quantize_input,
        allowed=bench.allowed,
        on_progress=bench.attacked,
        checkpoint=Partial(bench.store, step.key),
    )
    bench.store.finish(step.key, found.model_dump())
