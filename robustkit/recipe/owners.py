"""Which hooks the defenses of a variant define, read from their sources: no hook has two owners."""

from __future__ import annotations

from robustkit import registry
from robustkit.classes import hooks_of
from robustkit.errors import UsageError
from robustkit.recipe.order import Draft
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import EXCLUSIVE_HOOKS, WHOLE_BATCH_HOOKS, TrainSpec, Use, VariantSpec


def check_exclusive(reader: Reader, draft: Draft, defenses: tuple[Use, ...]) -> None:
    """Note each exclusive hook that two defenses of a variant own, and a curriculum that grows nothing."""
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


def check_parted(reader: Reader, draft: Draft, parent: VariantSpec | None, defenses: tuple[Use, ...]) -> None:
    """Note a vote that would start from one model, or be compressed, tuned or wrapped as one.

    Its members share no weights, and what stands before or beside them is not in what the vote promises.
    """
    above = [use.label for use in (parent.defenses if parent else ()) if "partition" in owned_hooks(reader, use)]
    own = [use.label for use in defenses if "partition" in owned_hooks(reader, use)]
    if above or (own and parent):
        message = f"{(above or own)[0]} trains several models from scratch; no variant can start from "
        reader.problem((*draft.path, "from"), message + ("their vote" if above else "another one"), "drop `from:`")
    elif own and draft.given.get("compress"):
        message = f"{own[0]} trains several models, whose vote cannot be compressed"
        reader.problem((*draft.path, "compress"), message, "drop `compress:`")
    wrappers = [use.label for use in defenses if "wrap" in defined_hooks(reader, use)]
    if own and wrappers:
        message = f"{wrappers[0]} wraps the vote of {own[0]}, and how many poisons that tolerates is not known then"
        reader.problem((*draft.path, "defenses"), message, f"drop {wrappers[0]}; a vote may be a member of an ensemble")


def check_steps(reader: Reader, draft: Draft, defenses: tuple[Use, ...], train: TrainSpec) -> None:
    """Note a training whose batches are parted although a defense looks at them whole, or that computes in two ways."""
    whole = [use.label for use in defenses if set(WHOLE_BATCH_HOOKS) & set(defined_hooks(reader, use))]
    own = draft.given.get("train")
    given = (*draft.path, "train") if isinstance(own, dict) else ("train",)
    if train.accumulate > 1 and whole:
        message = f"{whole[0]} looks at the whole batch at once, and accumulate parts it"
        reader.problem((*draft.path, "defenses"), message, f"drop `accumulate` or {whole[0]}")
    if train.checkpointing and train.compile is not False:
        message = "train.checkpointing and train.compile cannot go together"
        reader.problem((*given, "checkpointing"), message, "drop one of them")


def owned_hooks(reader: Reader, use: Use) -> tuple[str, ...]:
    """Return the exclusive hooks that a defense defines or inherits."""
    defined = defined_hooks(reader, use)
    return tuple(hook for hook in EXCLUSIVE_HOOKS if hook in defined)


def defined_hooks(reader: Reader, use: Use) -> tuple[str, ...]:
    """Return the names of the methods that a defense defines or inherits, read from its source."""
    try:
        entry = registry.find("defense", use.name, folder=reader.folder, plugins=reader.plugins)
    except UsageError:
        return ()
    if entry.origin == "registered":
        return _live_hooks(registry.load(entry))
    return hooks_of(entry.file, entry.attribute) if entry.file else ()


def _live_hooks(made: object) -> tuple[str, ...]:
    # Imported here, as it brings torch; a defense that is a class already has brought it before.
    from robustkit.train import hooks

    return hooks.overridden_hooks(made) if isinstance(made, type) and issubclass(made, hooks.Defense) else ()
