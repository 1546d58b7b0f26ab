"""The step that attacks a quantized model by what its surrogate may miss."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit import stats
from robustkit.evaluation.artefact import Setting, beside_surrogate
from robustkit.recipe.plan import Step
from robustkit.recipe.quantized import queries_of
from robustkit.seeding import derive_seed
from robustkit.steps.evaluate import FOOLING, OUTCOME, read_outcome
from robustkit.steps.fit import FLOAT
from robustkit.workbench import Workbench, threat_of


def artefact_step(bench: Workbench, step: Step) -> None:
    """Store which test examples withstand the float models' images, and which of the rest withstand queries."""
    assert step.use is not None
    fit, clean, *judged = step.parents
    test = bench.test()
    setting = Setting(
        test.images,
        test.labels,
        threat_of(bench.recipe.threat),
        derive_seed(step.seed, step.key),
        bench.recipe.evaluate.batch_size,
        bench.device,
        bench.recipe.evaluate.quantize_input,
        bench.attacked,
    )
    before = read_outcome(bench, clean)
    attacked = [bench.store.read_arrays(key, OUTCOME)["correct"] for key in judged]
    found = beside_surrogate(
        bench.model(fit),
        bench.load(fit, FLOAT),
        setting,
        clean=before,
        surrogate=stats.worst_case([before.correct, *attacked]),
        crafted=_crafted(bench, step, test.images),
        queries=queries_of(step.use),
    )
    arrays = {
        "correct": found.square.correct,
        "transfer": found.transfer.correct,
        "square": ~found.asked | found.square.correct,
        "labels": test.labels.cpu().numpy(),
    }
    bench.store.write_arrays(step.key, OUTCOME, arrays)
    record = {
        name: getattr(found.transfer, name) + getattr(found.square, name)
        for name in ("forwards", "backwards", "seconds", "projected", "not_finite", "silent")
    }
    record |= {"sets": found.sets, "disagreeing": found.disagreeing, "queries": queries_of(step.use)}
    bench.store.finish(step.key, record, (OUTCOME,))


def _crafted(bench: Workbench, step: Step, clean: Tensor) -> list[Tensor]:
    """Return the images that fooled float variants, each like the clean ones (N, C, H, W), as far as they were kept."""
    found = []
    for key in step.wants:
        record = bench.store.record(key)
        if record is not None and FOOLING in record["files"]:
            images = torch.from_numpy(bench.store.read_arrays(key, FOOLING)["images"])
            found += [images] if images.shape == clean.shape else []
    return found
