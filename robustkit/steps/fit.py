"""The fit step: a variant from its parent's weights or from scratch, compressed, trained, and saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import safetensors.torch as safetensors
import torch
from torch import Tensor, nn

from robustkit import registry
from robustkit.checkpoint import StateFile
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import Masks, hook_masks, is_hooked, without_hooks
from robustkit.compress.rewind import EpochKeeper
from robustkit.data.content import cache_folder
from robustkit.data.split import Dataset
from robustkit.errors import UsageError
from robustkit.models.artefact import save_model
from robustkit.models.build import build_model
from robustkit.models.grow import grow
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantized import made_of
from robustkit.models.whitening import whiten_
from robustkit.recipe.plan import Step, content_key
from robustkit.recipe.rewind import kept_epochs, root_of
from robustkit.recipe.spec import TrainSpec, VariantSpec
from robustkit.seeding import derive_seed
from robustkit.steps.members import fit_members, owner_of, remove_states
from robustkit.steps.teach import teach
from robustkit.store import MODEL, ONNX, STATE, write_atomic
from robustkit.train.hooks import Defense, is_taught, owned_hooks
from robustkit.train.loop import fit
from robustkit.workbench import Workbench, threat_of

LAST = "last.safetensors"
MEASURED = 512
"""Training images that the batch norms of a grown model are measured on."""
EARLY = "epoch-{}.safetensors"
FLOAT = "float.safetensors"
"""The model that a quantized one was made of."""


@dataclass
class _Made:
    """What a step has made so far. `last`: the model after the last epoch; `files`: those beside the model's own."""

    model: nn.Module
    last: nn.Module | None = None
    record: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def fit_step(bench: Workbench, step: Step) -> None:
    """Make a variant: its parent's weights or new ones, compressed, trained, saved as best and last."""
    variant = bench.recipe.variant(step.variant)
    data = bench.dataset(_validation(bench, variant))
    if variant.train and _parts(bench, variant):
        _fit_vote(bench, variant, step, data)
        return
    arrived = _start(bench, variant, step, data)
    keeper = _keeper(bench, variant, step, data, hook_masks(arrived))
    model = without_hooks(arrived).to(bench.device)
    if variant.train:
        made = _trained(bench, variant, variant.train, step, data, model, keeper)
    else:
        made = _Made(model if keeper is None else keeper.compress(model))
    if keeper is not None:
        _finish(bench, variant, step, data, made, keeper)
    if made.last is not None:
        _save(bench, made.last, variant, data, step, LAST)
    name = ONNX if isinstance(made.model, OnnxModel) else MODEL
    _save(bench, made.model, variant, data, step, name)
    if keeper is not None:
        keeper.shipped(made.model, bench.store.step(step.key) / name)
        if keeper.flags:
            made.record["flags"] = [*made.record.get("flags", []), *(flag.model_dump() for flag in keeper.flags)]
        made.record["notes"] = [*made.record.get("notes", []), *keeper.notes]
    bench.store.finish(step.key, {"variant": step.variant, "seed": step.seed, **made.record}, (name, *made.files))


def _trained(
    bench: Workbench,
    variant: VariantSpec,
    spec: TrainSpec,
    step: Step,
    data: Dataset,
    model: nn.Module,
    keeper: MaskKeeper | None,
) -> _Made:
    kept = kept_epochs(bench.recipe, variant)
    defenses = _defenses(bench, variant, keeper)
    epochs = EpochKeeper(kept, [defense for _, defense in defenses])
    defenses += [("epochs", epochs)] if kept else []
    # The last to be put in and the first to be taken out: what is rounded is what the others make of a layer.
    defenses += keeper.trainings(model) if keeper is not None else []
    teach(bench, step, defenses)
    fitted = fit(
        model,
        data,
        spec,
        defenses,
        threat=threat_of(variant.threat),
        seed=step.seed,
        key=step.key,
        device=bench.device,
        on_event=bench.events,
        checkpoint=StateFile(bench.store.step(step.key) / STATE, bench.warn),
        augment=[bench.create("augmentation", use) for use in spec.augment],  # type: ignore[misc]
        create=bench.create,
        choices=cache_folder() / "engines",
    )
    last = without_hooks(_start(bench, variant, step, data))
    last.load_state_dict(fitted.last_state)
    record = {
        "best_epoch": fitted.best_epoch,
        "epochs": [row.model_dump() for row in fitted.epochs],
        "flags": [flag.model_dump() for flag in fitted.flags],
        "notes": list(fitted.notes),
        "train_seconds": fitted.seconds,
        "poison": fitted.poison,
    }
    return _Made(fitted.model, last, record, (LAST, *_keep_early(bench, step, epochs, kept)))


def _finish(bench: Workbench, variant: VariantSpec, step: Step, data: Dataset, made: _Made, keeper: MaskKeeper) -> None:
    """End the compression; keep the model in floats beside one that is quantized."""
    made.model = keeper.finish(made.model)
    made.last = None if made.last is None else keeper.finish_last(made.last)
    if keeper.quantizers:
        _save(bench, made.model, variant, data, step, FLOAT)
        made.files = (*made.files, FLOAT)
        made.model = keeper.quantize(made.model)
        made.record["quantization"] = made_of(made.model)


def _parts(bench: Workbench, variant: VariantSpec) -> bool:
    """Say whether a variant's data are parted.

    Raises:
        UsageError: and it starts from another variant, is compressed or is to be: members have no common weights.
    """
    if owner_of(_defenses(bench, variant, None)) is None:
        return False
    if variant.parent or variant.compress:
        raise UsageError(f"{variant.label}: members of a vote are trained from scratch; drop `from` and `compress`")
    return True


def _fit_vote(bench: Workbench, variant: VariantSpec, step: Step, data: Dataset) -> None:
    def build(part: Dataset) -> nn.Module:
        return without_hooks(_build(bench, variant, step, part))

    def make() -> list[tuple[str, Defense]]:
        return _defenses(bench, variant, None)

    if any(is_taught(defense) for _, defense in make()):
        raise UsageError(f"{variant.label}: members of a vote cannot share a teacher: one poison could reach them all")
    found = fit_members(bench, variant, step, data, make, build)
    _save(bench, found.last, variant, data, step, LAST)
    _save(bench, found.best, variant, data, step, MODEL)
    bench.store.finish(step.key, {"variant": step.variant, "seed": step.seed, **found.record}, (MODEL, LAST))
    remove_states(bench, step)


def _validation(bench: Workbench, variant: VariantSpec) -> float:
    """Return the share that a variant's training, or the last one before it, held out of the training images."""
    while variant.train is None:
        assert variant.parent is not None
        variant = bench.recipe.variant(variant.parent)
    return variant.train.validation


def _save(bench: Workbench, model: nn.Module, variant: VariantSpec, data: Dataset, step: Step, name: str) -> None:
    folder = bench.store.step(step.key)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(
        model,
        folder / name,
        variant.model,
        shape=data.shape,
        classes=data.classes,
        wrappers=variant.wrappers,
        members={label: [bench.store.step(key) / MODEL for key in keys] for label, keys in step.members.items()},
    )


def _start(bench: Workbench, variant: VariantSpec, step: Step, data: Dataset) -> nn.Module:
    if step.origin:
        arrived = bench.load(step.origin, wrapped=False)
        assert variant.parent is not None
        if bench.recipe.variant(variant.parent).model == variant.model:
            return arrived
        larger = _build(bench, variant, step, data)
        generator = torch.Generator().manual_seed(derive_seed(step.seed, "grow", step.key))
        grow(arrived.cpu(), larger, generator, data.train.floats(0, MEASURED).cpu())
        return larger
    return _build(bench, variant, step, data)


def _build(bench: Workbench, variant: VariantSpec, step: Step, data: Dataset) -> nn.Module:
    with torch.random.fork_rng():
        # Variants of one architecture start from the same weights, so that differences come from the defenses.
        identity = content_key(model=variant.model.name, parameters=variant.model.parameters)
        torch.manual_seed(derive_seed(step.seed, "init", identity))
        given = bench.recipe.normalize
        model = build_model(
            variant.model,
            shape=data.shape,
            classes=len(data.classes),
            mean=given.mean if given else data.mean,
            std=given.std if given else data.std,
            folder=bench.recipe.folder,
            plugins=bench.recipe.plugins,
        )
    whiten_(model, data.train.images)
    return model


def _keeper(bench: Workbench, variant: VariantSpec, step: Step, data: Dataset, held: Masks) -> MaskKeeper | None:
    inherit = _compressed(bench, variant.parent) or (bool(step.origin) and _prunes_itself(bench, variant, step, data))
    if not variant.compress and not inherit and not held.tensors:
        return None
    return MaskKeeper(
        [bench.create("compressor", use) for use in variant.compress],
        inherit=inherit,
        context_seed=derive_seed(step.seed, step.key, "compress"),
        example=torch.zeros(2, *data.shape),
        threat=threat_of(variant.threat),
        held=held,
        train=data.train,
        early=lambda epoch: _early(bench, variant, step, data, epoch),
        defenses=_defenses(bench, variant, None),
    )


def _keep_early(bench: Workbench, step: Step, epochs: EpochKeeper, kept: tuple[int, ...]) -> tuple[str, ...]:
    """Write the weights that other variants are rewound to, and return the names of the files."""
    names = []
    for epoch in kept:
        weights = {name: value.cpu().contiguous() for name, value in epochs.weights(epoch).items()}
        write_atomic(bench.store.step(step.key) / EARLY.format(epoch), safetensors.save(weights))
        names.append(EARLY.format(epoch))
    return tuple(names)


def _early(bench: Workbench, variant: VariantSpec, step: Step, data: Dataset, epoch: int) -> dict[str, Tensor]:
    """Return the weights that the first variant of a line had after an epoch of its training, or before it."""
    root = root_of(variant, {one.label: one for one in bench.recipe.variants})
    if epoch == 0:
        return without_hooks(_build(bench, root, step, data)).state_dict()
    key = bench.plan.fit_keys[root.label, step.seed]
    return safetensors.load_file(bench.store.step(key) / EARLY.format(epoch))


def _prunes_itself(bench: Workbench, variant: VariantSpec, step: Step, data: Dataset) -> bool:
    """Say whether new models of the variant's class have torch.nn.utils.prune hooks, so that its parent's did."""
    entry = registry.find("model", variant.model.name, folder=bench.recipe.folder, plugins=bench.recipe.plugins)
    return entry.origin not in ("builtin", "torchvision") and is_hooked(_build(bench, variant, step, data))


def _compressed(bench: Workbench, label: str | None) -> bool:
    """Say whether a variant or one that it descends from is compressed: then its zeros are inherited."""
    while label is not None:
        variant = bench.recipe.variant(label)
        if variant.compress:
            return True
        label = variant.parent
    return False


def _defenses(bench: Workbench, variant: VariantSpec, keeper: MaskKeeper | None) -> list[tuple[str, Defense]]:
    # The masks come first: what the others add to the model, or average, then starts from what is pruned already.
    named: list[tuple[str, Defense]] = [] if keeper is None else [("masks", keeper)]
    seen: dict[str, int] = {}
    owners: dict[str, str] = {}
    for use in variant.defenses:
        seen[use.name] = seen.get(use.name, 0) + 1
        defense = bench.create("defense", use)
        assert isinstance(defense, Defense)
        _check_owner(use.label, defense, owners)
        # The number of the use, not its label: renaming must not shift any random number.
        named.append((f"{use.name}#{seen[use.name]}", defense))
    return named


def _check_owner(label: str, defense: Defense, owners: dict[str, str]) -> None:
    """Note the exclusive hooks of a defense. The recipe was checked by its sources; this sees the classes themselves.

    Raises:
        UsageError: another defense of the variant owns one of them already.
    """
    for hook in owned_hooks(type(defense)):
        if hook in owners:
            raise UsageError(
                f"{owners[hook]} and {label} both own `{hook}`; a variant can have one of them: keep one, or make "
                "two variants"
            )
        owners[hook] = label
