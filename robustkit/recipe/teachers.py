"""The variants that others learn from: a teacher and a defense that wants one belong together."""

from __future__ import annotations

from robustkit.recipe.order import Draft
from robustkit.recipe.owners import defined_hooks
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import Use, VariantSpec

HOOK = "take_teacher"
"""What a defense overrides that learns from a teacher."""


def teacher_of(
    reader: Reader, draft: Draft, parent: VariantSpec | None, defenses: tuple[Use, ...], trains: bool
) -> str | None:
    """Return the label of the variant that one learns from: its own, else its parent's where it keeps its defenses.

    A teacher that nothing learns from, and a defense without the teacher that it needs, are problems.
    """
    inherited = parent.teacher if parent is not None and "defenses" not in draft.given else None
    teacher = draft.teacher or inherited
    learners = [use.label for use in defenses if HOOK in defined_hooks(reader, use)]
    parted = [use.label for use in defenses if "partition" in defined_hooks(reader, use)]
    if trains and learners and parted:
        message = f"the members of {parted[0]} would share a teacher: one poisoned example could reach them all"
        reader.problem((*draft.path, "defenses"), message, f"drop {learners[0]}; a vote may be a teacher itself")
    if draft.given.get("teacher") is not None:
        _check_used(reader, draft, learners, trains)
    elif trains and learners and teacher is None:
        message = f"{learners[0]} learns from a teacher, and {draft.label!r} has none"
        lost = parent.teacher if parent is not None else None
        hint = f"add `teacher: {lost}`, as its parent has" if lost else "add `teacher:` and the label of a variant"
        reader.problem((*draft.path, "defenses"), message, hint)
    return teacher


def _check_used(reader: Reader, draft: Draft, learners: list[str], trains: bool) -> None:
    path = (*draft.path, "teacher")
    if not trains:
        reader.problem(path, "a teacher does nothing here: the variant is not trained", "add `train: {}`")
    elif not learners:
        hint = "add distill, ard or rslad to its `defenses:`, or drop `teacher:`"
        reader.problem(path, f"no defense of {draft.label!r} learns from a teacher", hint)
