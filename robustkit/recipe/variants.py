"""The tree of variants: matrices expanded, parents found, what a child inherits filled in."""

from __future__ import annotations

import re
from typing import Any

from robustkit.recipe.budget import budget_problem
from robustkit.recipe.document import PathTuple
from robustkit.recipe.growth import growth_problem
from robustkit.recipe.matrix import MatrixError, combinations, substitute, substitute_text
from robustkit.recipe.members import members_of, named_members
from robustkit.recipe.order import Draft, ordered
from robustkit.recipe.owners import check_exclusive, check_parted, check_steps, defined_hooks
from robustkit.recipe.parts import read_threat, read_train
from robustkit.recipe.quantized import quantized_problem
from robustkit.recipe.reader import Reader
from robustkit.recipe.rewind import rewind_problem
from robustkit.recipe.spec import ThreatSpec, TrainSpec, Use, VariantSpec
from robustkit.recipe.teachers import teacher_of

KEYS = ("matrix", "from", "teacher", "model", "threat", "defenses", "compress", "train")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")


def read_variants(
    reader: Reader, value: object, present: bool, model: Use | None, threat: ThreatSpec, train: TrainSpec
) -> tuple[VariantSpec, ...]:
    """Return the variants in an order in which parents and teachers come first; problems go to the reader."""
    if not present or not value:
        reader.problem(("variants",), "`variants` is missing or empty", "e.g. variants: {baseline: }")
        return ()
    if not isinstance(value, dict):
        reader.problem(("variants",), "variants are a mapping of label to what is done", "variants: {baseline: }")
        return ()
    drafts = [draft for label, given in value.items() for draft in _expand(reader, label, given)]
    by_label = _unique(reader, drafts)
    reader.labels = tuple(by_label)
    done: dict[str, VariantSpec] = {}
    for draft in ordered(reader, by_label):
        spec = _variant(reader, draft, done, model, threat, train)
        if spec is not None:
            done[draft.label] = spec
    return tuple(done.values())


def _expand(reader: Reader, label: str, value: object) -> list[Draft]:
    path: PathTuple = ("variants", label)
    given = reader.mapping(path, value, KEYS)
    matrix = given.pop("matrix", None)
    try:
        if matrix is None:
            return [_draft(reader, label, path, given, {})]
        if not isinstance(matrix, dict) or not matrix:
            raise MatrixError("matrix is a mapping of name to a list of values, e.g. {percent: [50, 80]}")
        return [_draft(reader, label, path, given, names) for names in combinations(matrix)]
    except MatrixError as error:
        message, _, hint = str(error).partition("; ")
        where = path if matrix is None else (*path, "matrix")
        reader.problem(where, message, hint or None, key=matrix is None)
        return []


def _draft(reader: Reader, label: str, path: PathTuple, given: dict[str, Any], names: dict[str, Any]) -> Draft:
    filled = substitute(given, names)
    return Draft(substitute_text(label, names), path, filled, named_members(reader, path, filled))


def _unique(reader: Reader, drafts: list[Draft]) -> dict[str, Draft]:
    found: dict[str, Draft] = {}
    for draft in drafts:
        if not LABEL.fullmatch(draft.label):
            hint = "letters, digits, . _ + - and at most 80 of them"
            reader.problem(draft.path, f"{draft.label!r} cannot be a label", hint, key=True)
        elif draft.label in found:
            from_matrix = draft.path == found[draft.label].path
            hint = "put every $name of the matrix into the label" if from_matrix else "labels must differ"
            reader.problem(draft.path, f"two variants are called {draft.label!r}", hint, key=True)
        else:
            found[draft.label] = draft
    return found


def _variant(
    reader: Reader,
    draft: Draft,
    done: dict[str, VariantSpec],
    model: Use | None,
    threat: ThreatSpec,
    train: TrainSpec,
) -> VariantSpec | None:
    path, given = draft.path, draft.given
    parent = done.get(draft.parent) if draft.parent else None
    lost = draft.given.get("from") is not None and parent is None
    chosen = _model(reader, draft, parent, model, done)
    budget = parent.threat if parent else threat
    if given.get("threat") is not None:
        budget = read_threat(reader, (*path, "threat"), given["threat"]) or budget
    defenses = parent.defenses if parent else ()
    if "defenses" in given:
        defenses = reader.uses("defense", (*path, "defenses"), given["defenses"])
    compress = reader.uses("compressor", (*path, "compress"), given.get("compress"))
    trains = parent is None or given.get("train") is not None
    update = read_train(reader, (*path, "train"), given.get("train"))
    wrappers = tuple(use for use in defenses if "wrap" in defined_hooks(reader, use))
    if not trains and any(use not in wrappers for use in defenses) and given.get("defenses"):
        reader.problem((*path, "defenses"), "defenses do nothing here: the variant is not trained", "add `train: {}`")
    # What was meant by a plugin that is not known is not to be guessed.
    unread = bool(given.get("defenses")) and not defenses
    if parent is not None and not trains and not given.get("compress") and wrappers == parent.wrappers and not unread:
        reader.problem(
            path, f"{draft.label!r} changes nothing of {parent.label!r}", "add compress: or train:", key=True
        )
    wrong = None if lost else rewind_problem(compress, parent, trains, done, chosen)
    for problem in (wrong, budget_problem(compress)):
        if problem is not None:
            reader.problem((*path, "compress"), *problem)
    broken = None if lost else quantized_problem(compress, parent, trains, defenses)
    if broken is not None:
        reader.problem((*path, broken[0]), *broken[1:])
    if trains:
        check_exclusive(reader, draft, defenses)
        check_steps(reader, draft, defenses, train.model_copy(update=update))
    check_parted(reader, draft, parent, defenses)
    # What a child inherits is not known where its parent is lost.
    teacher = None if lost and "defenses" not in given else teacher_of(reader, draft, parent, defenses, trains)
    members = members_of(reader, draft, parent, wrappers, trains or bool(compress), done)
    if chosen is None or lost:
        return None
    return VariantSpec(
        label=draft.label,
        parent=draft.parent,
        teacher=teacher,
        model=chosen,
        threat=budget,
        defenses=defenses,
        wrappers=wrappers,
        members=members,
        compress=compress,
        train=train.model_copy(update=update) if trains else None,
    )


def _model(
    reader: Reader, draft: Draft, parent: VariantSpec | None, model: Use | None, done: dict[str, VariantSpec]
) -> Use | None:
    if draft.given.get("model") is None:
        return parent.model if parent else model
    chosen = reader.use("model", (*draft.path, "model"), draft.given["model"])
    if parent is not None and chosen is not None and chosen != parent.model:
        wrong = growth_problem(parent, chosen, done)
        if wrong is not None:
            reader.problem((*draft.path, "model"), *wrong)
    return chosen
