"""The steps about poisoned training data: how often the poison works, and how much of it a vote tolerates."""

from __future__ import annotations

from robustkit.data.poison.plant import poison_of
from robustkit.evaluation.poisoned import fooled_by
from robustkit.evaluation.tolerated import tolerance
from robustkit.models.vote import Vote
from robustkit.recipe.plan import Step
from robustkit.steps.evaluate import OUTCOME
from robustkit.workbench import Workbench


def success_step(bench: Workbench, step: Step) -> None:
    """Store which of the triggered test images a model takes for the target of the poison."""
    recipe, test = bench.recipe, bench.test()
    assert recipe.poison is not None
    fooled = fooled_by(
        bench.model(step.parents[0]),
        test.images,
        test.labels,
        poison_of(recipe.poison, recipe.folder, recipe.plugins),
        batch_size=recipe.evaluate.batch_size,
        device=bench.device,
    )
    bench.store.write_arrays(step.key, OUTCOME, {"fooled": fooled})
    bench.store.finish(step.key, {"fooled": int(fooled.sum()), "n": int(fooled.size)}, (OUTCOME,))


def tolerance_step(bench: Workbench, step: Step) -> None:
    """Store how many poisoned training examples cannot change the answer of a vote, for each test example."""
    model, test = bench.model(step.parents[0]), bench.test()
    assert isinstance(model, Vote)
    radius, right = tolerance(
        model, test.images, test.labels, batch_size=bench.recipe.evaluate.batch_size, device=bench.device
    )
    bench.store.write_arrays(step.key, OUTCOME, {"radius": radius, "right": right})
    bench.store.finish(step.key, {"members": len(model.members)}, (OUTCOME,))
