"""The steps beside the attacks: certificates, whether attacks contradict them, and common corruptions."""

from __future__ import annotations

from typing import cast

from robustkit.certificates.certificate import Certificate
from robustkit.data.corruptions import CORRUPTIONS
from robustkit.evaluation.certified import certified_outcome, check_sound
from robustkit.evaluation.corrupted import corruption_outcome, mean_accuracy
from robustkit.recipe.plan import Step
from robustkit.seeding import derive_seed
from robustkit.steps.evaluate import OUTCOME
from robustkit.workbench import Workbench, threat_of

CERTIFIED = "certified.npz"
CORRUPTED = "corrupted.npz"


def certify_step(bench: Workbench, step: Step) -> None:
    """Store which test examples a certificate covers, and how far around each."""
    assert step.use is not None
    test = bench.test()
    outcome = certified_outcome(
        bench.model(step.parents[0]),
        test.images,
        test.labels,
        cast(Certificate, bench.create("certificate", step.use)),
        threat_of(bench.recipe.threat),
        seed=derive_seed(step.seed, step.key, "certify"),
        label=step.use.name,
        batch_size=bench.recipe.evaluate.batch_size,
        device=bench.device,
        on_progress=bench.progress,
    )
    arrays = {"certified": outcome.certified, "prediction": outcome.prediction, "radius": outcome.radius}
    bench.store.write_arrays(step.key, CERTIFIED, arrays)
    record = {
        "smoothed": outcome.smoothed,
        "clean": outcome.clean.model_dump(),
        "abstained": outcome.abstained,
        "radius": outcome.median_radius,
        "forwards": outcome.forwards,
        "seconds": outcome.seconds,
    }
    bench.store.finish(step.key, record, (CERTIFIED,))


def soundness_step(bench: Workbench, step: Step) -> None:
    """Hold every certificate of a model against every attack on it, and against its clean images.

    What failed is left out; the step then stays open, so that it is done again once that is there.

    Raises:
        InternalError: an attack breaks an example that is certified.
    """
    certified, correct = {}, {}
    for other in bench.plan.of(step.variant, step.seed):
        record = bench.store.record(other.key) if other.key in step.parents else None
        if record is None:
            continue
        label = other.use.label if other.use else other.kind
        if other.kind != "certify":
            correct[label] = bench.store.read_arrays(other.key, OUTCOME)["correct"]
        elif not record["smoothed"]:
            certified[label] = bench.store.read_arrays(other.key, CERTIFIED)["certified"]
    check_sound(certified, correct)
    if all(bench.store.done(key) for key in step.parents):
        bench.store.finish(step.key, {"certificates": len(certified), "attacks": len(correct)})


def corruptions_step(bench: Workbench, step: Step) -> None:
    """Store which test examples are right under each common corruption at each severity."""
    test = bench.test()
    correct = corruption_outcome(
        bench.model(step.parents[0]),
        test.images,
        test.labels,
        tuple(CORRUPTIONS),
        batch_size=bench.recipe.evaluate.batch_size,
        device=bench.device,
        on_progress=bench.progress,
    )
    bench.store.write_arrays(step.key, CORRUPTED, dict(correct))
    by = {name: [round(float(row.mean()), 6) for row in values] for name, values in correct.items()}
    bench.store.finish(step.key, {"mean": mean_accuracy(correct).model_dump(), "by": by}, (CORRUPTED,))
