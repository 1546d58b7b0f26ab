"""The only place that executes steps: what is in the store is read, the rest is run, in the order of the plan."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustkit import provenance, registry
from robustkit.assemble import assemble
from robustkit.data.fingerprint import fingerprint, poisoned_fingerprint
from robustkit.errors import InternalError, RobustkitError, UsageError
from robustkit.recipe.plan import Plan, Step, make_plan
from robustkit.recipe.quantized import lacks_packages
from robustkit.recipe.spec import Recipe, Use
from robustkit.results import Results, write_results
from robustkit.store import EventLog, Store, write_atomic, write_json

OnEvent = Callable[[str, Mapping[str, Any]], None]

PLUGIN_KINDS: dict[str, registry.Kind] = {
    "model": "model",
    "defense": "defense",
    "compressor": "compressor",
    "attack": "attack",
    "certificate": "certificate",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "augmentation": "augmentation",
    "data": "data",
    "poison": "poison",
}

PARTIAL = ("latency", "soundness")
"""Steps that do what they can with those of their parents that are there."""


@dataclass(frozen=True)
class Failure:
    """A step that failed: its variant, what it did, and the message for the person at the terminal."""

    step: Step
    message: str


@dataclass(frozen=True)
class RunOutcome:
    """What a run left behind."""

    folder: Path
    results: Results
    report: Path
    failures: tuple[Failure, ...] = ()


@dataclass
class Events:
    """Sends each event to the log and to a listener, with the variant and seed it belongs to."""

    log: EventLog
    listener: OnEvent | None
    context: dict[str, Any] = field(default_factory=dict)

    def __call__(self, event: str, values: Mapping[str, Any] | None = None) -> None:
        """Send one event; `step` events are for progress bars only and are not logged."""
        merged = {**self.context, **(values or {})}
        if event != "step":
            self.log.write(event, merged)
        if self.listener is not None:
            self.listener(event, merged)


def entry_of(kind: str, use: Use, recipe: Recipe) -> registry.Entry:
    """Return the registry's entry of a plugin use in a recipe."""
    return registry.find(PLUGIN_KINDS[kind], use.name, folder=recipe.folder, plugins=recipe.plugins)


def plan_of(recipe: Recipe, *, cache: Path | None = None, fetch: bool = True) -> Plan:
    """Return the plan of a recipe on its data as they lie on the disk now. Imports no torch, but for a download.

    Raises:
        DataError: the data are missing or broken.
        NotDownloaded: they are to be downloaded, and `fetch` is off.
    """
    data = fingerprint(recipe.data, cache=cache, folder=recipe.folder, plugins=recipe.plugins, fetch=fetch)
    if recipe.poison is not None:
        data = poisoned_fingerprint(data, recipe.poison, folder=recipe.folder, plugins=recipe.plugins)
    return make_plan(recipe, data, lambda kind, use: registry.source_hash(entry_of(kind, use, recipe)))


def user_code(recipe: Recipe) -> list[str]:
    """Return the names in a recipe that run code from outside robustkit and its libraries."""
    uses: list[tuple[str, Use]] = [("data", recipe.data)]
    uses += [("poison", recipe.poison)] if recipe.poison else []
    for variant in recipe.variants:
        uses.append(("model", variant.model))
        uses += [("defense", use) for use in variant.defenses]
        uses += [("compressor", use) for use in variant.compress]
        if variant.train:
            uses += [("optimizer", variant.train.optimizer), ("schedule", variant.train.schedule)]
            uses += [("augmentation", use) for use in variant.train.augment]
    uses += [("attack", use) for use in recipe.evaluate.attacks]
    uses += [("certificate", use) for use in recipe.evaluate.certify]
    named = {use.name for kind, use in uses if registry.runs_user_code(entry_of(kind, use, recipe))}
    return sorted(named | {str(path) for path in recipe.plugins})


def check_trust(recipe: Recipe, trust_plugins: bool) -> None:
    """Raise a UsageError where a recipe names user code and nobody said that it may run."""
    named = user_code(recipe)
    if named and not trust_plugins:
        raise UsageError(
            f"this recipe runs code from {', '.join(named)}. Read that code; if you trust it, "
            "add --trust-plugins to the command"
        )


def run(
    recipe: Recipe,
    folder: Path,
    *,
    trust_plugins: bool = False,
    on_event: OnEvent | None = None,
    recipe_text: str | None = None,
    overrides: Sequence[str] = (),
    command: list[str] | None = None,
) -> RunOutcome:
    """Run a recipe into a folder and return what was found; `recipe_text` and `overrides` are what it was read from.

    Steps that are in the folder already are not run again. A variant that fails takes its descendants with it; the
    others go on, and the report covers what is there. After an internal error nothing more is run.

    Raises:
        UsageError: another process holds the folder, user code is not trusted, or packages that it needs are missing.
        RobustkitError: nothing at all could be run.
    """
    check_trust(recipe, trust_plugins)
    lacking = lacks_packages(recipe.variants)
    if lacking is not None:
        raise UsageError(lacking)
    store = Store(folder)
    with store.lock():
        log = EventLog(folder / "events.jsonl")
        try:
            events = Events(log, on_event)
            return _run(recipe, store, events, recipe_text, overrides, command)
        finally:
            log.close()


def _run(
    recipe: Recipe,
    store: Store,
    events: Events,
    recipe_text: str | None,
    overrides: Sequence[str],
    command: list[str] | None,
) -> RunOutcome:
    plan = plan_of(recipe)
    if recipe_text is not None:
        write_atomic(store.folder / "recipe.yaml", recipe_text.encode())
    write_json(store.folder / "resolved.json", recipe.model_dump(mode="json"))
    todo = pending(plan, store)
    events("run", {"name": recipe.name, "steps": len(plan.steps), "todo": len(todo)})
    failures = _execute(plan, todo, store, events) if todo else ()
    # A run that found everything done keeps what the work was done on.
    ran_on = (None if todo else _earlier(store)) or provenance.collect(command)
    # They belong to recipe.yaml, which is this run's in any case.
    ran_on["overrides"] = list(overrides)
    write_json(store.folder / "provenance.json", ran_on)
    results = assemble(plan, store, ran_on, {failure.step.key: failure.message for failure in failures})
    if not results.variants:
        raise RobustkitError("no variant could be evaluated:\n" + "\n".join(f.message for f in failures))
    write_results_atomic(results, store)
    report = _write_report(store.folder)
    events("finished", {"report": str(report), "failed": len(failures)})
    return RunOutcome(store.folder, results, report, failures)


def _earlier(store: Store) -> dict[str, Any] | None:
    """Return the provenance that the folder holds, or None where there is none to read."""
    try:
        found = json.loads((store.folder / "provenance.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_report(folder: Path) -> Path:
    # Imported here, so that `check` waits for no matplotlib.
    from robustkit.report.write import write_report

    return write_report(folder)


def write_results_atomic(results: Results, store: Store) -> None:
    """Write results.json so that a crash leaves the old one or the new one."""
    temporary = store.folder / ".results.json.tmp"
    write_results(results, temporary)
    temporary.replace(store.folder / "results.json")


def pending(plan: Plan, store: Store) -> list[Step]:
    """Return the steps that are not in the store, each key once."""
    todo: dict[str, Step] = {}
    for step in plan.steps:
        if step.key not in todo and not store.done(step.key):
            todo[step.key] = step
    return list(todo.values())


def _execute(plan: Plan, todo: list[Step], store: Store, events: Events) -> tuple[Failure, ...]:
    from robustkit.steps import STEPS
    from robustkit.workbench import Workbench

    bench = Workbench(plan, store, events)
    failures: list[Failure] = []
    for number, step in enumerate(todo, 1):
        if step.kind not in PARTIAL and bench.failed & set(step.parents):
            bench.failed.add(step.key)
            if step.kind == "fit":
                failures.append(Failure(step, f"not made, because {_lost(plan, step, bench.failed)} failed"))
            continue
        events.context = {"variant": step.variant, "seed": step.seed, "kind": step.kind, "key": step.key}
        events("start", {"number": number, "todo": len(todo), "description": step.description})
        started, stop = time.perf_counter(), False
        try:
            STEPS[step.kind](bench, step)
        except RobustkitError as error:
            failures.append(Failure(step, str(error)))
            stop = isinstance(error, InternalError)
        except Exception as error:  # a user's plugin may raise anything; the trace goes into the events
            events("trace", {"trace": traceback.format_exc()})
            failures.append(Failure(step, _where(error)))
        else:
            events("done", {"seconds": round(time.perf_counter() - started, 3)})
            continue
        bench.failed.add(step.key)
        events("failed", {"message": failures[-1].message})
        if stop:
            rest = [one for one in todo[number:] if one.kind == "fit"]
            failures += [Failure(one, "not made, because the run stopped at an internal error") for one in rest]
            break
    events.context = {}
    return tuple(failures)


def _lost(plan: Plan, step: Step, failed: set[str]) -> str:
    """Return the labels of the variants that a fit step needs and that failed."""
    variant = plan.recipe.variant(step.variant)
    needed = dict.fromkeys(label for label in (variant.parent, variant.teacher) if label)
    return " and ".join(label for label in needed if plan.fit_keys[label, step.seed] in failed)


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}; the trace is in events.jsonl"
