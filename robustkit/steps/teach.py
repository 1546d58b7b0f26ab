"""How the defenses of a fit step get the stored model that they learn from."""

from __future__ import annotations

from robustkit.errors import UsageError
from robustkit.recipe.plan import Step
from robustkit.train.hooks import is_taught
from robustkit.train.state import Named
from robustkit.workbench import Workbench


def teach(bench: Workbench, step: Step, defenses: Named) -> None:
    """Give the teacher's stored model to each defense that learns from one.

    The recipe was checked by the sources of the defenses; this sees the classes themselves.

    Raises:
        UsageError: a defense needs a teacher and the variant has none, or no defense learns from the one it has.
    """
    learners = [(label.partition("#")[0], defense) for label, defense in defenses if is_taught(defense)]
    if learners and step.teacher is None:
        raise UsageError(
            f"{step.variant}: {learners[0][0]} learns from a teacher; add `teacher:` and a variant's label"
        )
    if step.teacher is None:
        return
    if not learners:
        raise UsageError(f"{step.variant}: no defense learns from its teacher; drop `teacher:`, or add distill")
    teacher = bench.load(step.teacher)
    for _, defense in learners:
        defense.take_teacher(teacher)
