"""The tree of variants: matrices expanded, parents found, what a child inherits filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from robustkit import registry
from robustkit.classes import hooks_of
from robustkit.errors import UsageError, did_you_mean
from robustkit.recipe.budget import budget_problem
from robustkit.recipe.document import PathTuple
from robustkit.recipe.growth import growth_problem
from robustkit.recipe.matrix import MatrixError, combinations, substitute, substitute_text
from robustkit.recipe.parts import read_threat, read_train
from robustkit.recipe.reader import Reader
from robustkit.recipe.rewind import rewind_problem
from robustkit.recipe.spec import EXCLUSIVE_HOOKS, ThreatSpec, TrainSpec, Use, VariantSpec

KEYS = ("matrix", "from", "model", "threat", "defenses", "compress", "train")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")


@dataclass(frozen=True)
class Draft:
    """A variant as it is written, after its matrix was expanded. `path` is where it stands in the file."""

    label: str
    path: PathTuple
    given: dict[str, Any]

    @property
    def parent(self) -> str | None:
        """The label that `from:` names."""
        found = self.given.get("from")
        return found if isinstance(found, str) else None


def read_variants(
    reader: Reader, value: object, present: bool, model: Use | None, threat: ThreatSpec, train: TrainSpec
) -> tuple[VariantSpec, ...]:
    """Return the variants in an order in which parents come first; problems go to the reader."""
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
    for draft in _ordered(reader, by_label):
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
            return [Draft(substitute_text(label, {}), path, substitute(given, {}))]
        if not isinstance(matrix, dict) or not matrix:
            raise MatrixError("matrix is a mapping of name to a list of values, e.g. {percent: [50, 80]}")
        return [Draft(substitute_text(label, names), path, substitute(given, names)) for names in combinations(matrix)]
    except MatrixError as error:
        message, _, hint = str(error).partition("; ")
        where = path if matrix is None else (*path, "matrix")
        reader.problem(where, message, hint or None, key=matrix is None)
        return []


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


def _ordered(reader: Reader, drafts: dict[str, Draft]) -> list[Draft]:
    """Return parents before children, else in the order of the file; cycles and missing parents are problems.

    Variants without a parent that can be had come last: what else is wrong with them is to be said as well.
    """
    done: list[Draft] = []
    placed: set[str] = set()
    waiting, lost = dict(drafts), []
    for draft in drafts.values():
        parent = draft.given.get("from")
        if parent is not None and not isinstance(parent, str):
            reader.problem((*draft.path, "from"), "`from` is the label of one variant")
            lost.append(waiting.pop(draft.label))
        elif parent is not None and parent not in drafts:
            hint = did_you_mean(parent, drafts)
            reader.problem((*draft.path, "from"), f"there is no variant {parent!r}", hint)
            lost.append(waiting.pop(draft.label))
    while True:
        ready = [one for one in waiting.values() if one.parent is None or one.parent in placed]
        if not ready:
            break
        # One at a time, so that a child follows its parent and the file's order decides the rest.
        first = ready[0]
        done.append(first)
        placed.add(first.label)
        del waiting[first.label]
    told: set[str] = set()
    for draft in waiting.values():
        chain = _cycle(draft, drafts)
        if chain and not told & set(chain):
            told |= set(chain)
            reader.problem((*draft.path, "from"), f"`from` goes in a circle: {' -> '.join(chain)}")
    return [*done, *lost, *waiting.values()]


def _cycle(draft: Draft, drafts: dict[str, Draft]) -> list[str]:
    chain = [draft.label]
    current: Draft | None = draft
    while current is not None and current.parent in drafts:
        parent = current.parent
        assert parent is not None
        if parent == draft.label:
            return [*chain, parent]
        if parent in chain:
            return []
        chain.append(parent)
        current = drafts.get(parent)
    return []


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
    if not trains and given.get("defenses"):
        reader.problem((*path, "defenses"), "defenses do nothing here: the variant is not trained", "add `train: {}`")
    if parent is not None and not trains and not compress:
        reader.problem(
            path, f"{draft.label!r} changes nothing of {parent.label!r}", "add compress: or train:", key=True
        )
    wrong = None if lost else rewind_problem(compress, parent, trains, done)
    for problem in (wrong, budget_problem(compress)):
        if problem is not None:
            reader.problem((*path, "compress"), *problem)
    if trains:
        _check_exclusive(reader, draft, defenses)
    _check_parted(reader, draft, parent, defenses)
    if chosen is None or lost:
        return None
    return VariantSpec(
        label=draft.label,
        parent=draft.parent,
        model=chosen,
        threat=budget,
        defenses=defenses,
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


def _check_exclusive(reader: Reader, draft: Draft, defenses: tuple[Use, ...]) -> None:
    owners: dict[str, str] = {}
    for use in defenses:
        for hook in owned_hooks(reader, use):
            if hook in owners and owners[hook] != use.label:
                reader.problem(
                    (*draft.path, "defenses"),
                    f"{owners[hook]} and {use.label} both own `{hook}`; a variant can have one of them",
                    "keep one, or make two variants",
                )
            owners[hook] = use.label
    curricula = [use.label for use in defenses if use.name == "curriculum"]
    if curricula and "perturb" not in owners and not any(_is_own(reader, use) for use in defenses):
        message = "curriculum grows the eps of adversarial training, and no defense here perturbs"
        reader.problem((*draft.path, "defenses"), message, "add n_fgsm or pgd_training, or drop it")


def _is_own(reader: Reader, use: Use) -> bool:
    """Say whether a defense is not built in: its source may hide what it owns."""
    try:
        return registry.find("defense", use.name, folder=reader.folder, plugins=reader.plugins).origin != "builtin"
    except UsageError:
        return True


def _check_parted(reader: Reader, draft: Draft, parent: VariantSpec | None, defenses: tuple[Use, ...]) -> None:
    """Note a vote that would start from one model, or be compressed or tuned as one: its members share no weights."""
    above = [use.label for use in (parent.defenses if parent else ()) if "partition" in owned_hooks(reader, use)]
    own = [use.label for use in defenses if "partition" in owned_hooks(reader, use)]
    if above or (own and parent):
        message = f"{(above or own)[0]} trains several models from scratch; no variant can start from "
        reader.problem((*draft.path, "from"), message + ("their vote" if above else "another one"), "drop `from:`")
    elif own and draft.given.get("compress"):
        message = f"{own[0]} trains several models, whose vote cannot be compressed"
        reader.problem((*draft.path, "compress"), message, "drop `compress:`")


def owned_hooks(reader: Reader, use: Use) -> tuple[str, ...]:
    """Return the exclusive hooks that a defense defines or inherits, read from its source."""
    try:
        entry = registry.find("defense", use.name, folder=reader.folder, plugins=reader.plugins)
    except UsageError:
        return ()
    if entry.origin == "registered":
        return _live_hooks(registry.load(entry))
    defined = hooks_of(entry.file, entry.attribute) if entry.file else ()
    return tuple(hook for hook in EXCLUSIVE_HOOKS if hook in defined)


def _live_hooks(made: object) -> tuple[str, ...]:
    # Imported here, as it brings torch; a defense that is a class already has brought it before.
    from robustkit.train import hooks

    return hooks.owned_hooks(made) if isinstance(made, type) and issubclass(made, hooks.Defense) else ()
