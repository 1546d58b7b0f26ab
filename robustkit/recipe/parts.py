"""The parts of a recipe that stand both at its top and in a variant: threat and training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from robustkit.params import Duration, Fraction, NonNegativeFloat, Number, PositiveFloat, PositiveInt
from robustkit.recipe.document import PathTuple
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import Norm, NormalizeSpec, StageSpec, ThreatSpec


class Plain(BaseModel):
    """Base of the parts of a recipe that hold plain values."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ThreatInput(Plain):
    """`threat:`"""

    norm: Norm = "linf"
    eps: NonNegativeFloat = 8 / 255


class NormalizeInput(Plain):
    """`normalize:`"""

    mean: tuple[Number, ...] = Field(min_length=1)
    std: tuple[PositiveFloat, ...] = Field(min_length=1)


class TrainInput(Plain):
    """`train:` without its plugins."""

    epochs: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    validation: Annotated[Fraction, Field(gt=0, lt=1)] | None = None
    select: Literal["auto", "clean", "robust", "last"] | None = None
    precision: Literal["auto", "fp32", "bf16"] | None = None
    compile: Literal["auto"] | StrictBool | None = None
    accumulate: PositiveInt | None = None
    checkpointing: bool | None = None
    deterministic: bool | None = None
    memory_limit: PositiveInt | None = None
    guards: bool | None = None
    time_limit: Duration | None = None
    monitor_test: bool | None = None


class StageInput(Plain):
    """One item of `train.stages`."""

    epochs: PositiveInt
    lr: PositiveFloat = 1.0
    eps: Annotated[Fraction, Field(ge=0, le=1)] = 1.0
    resolution: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    freeze: tuple[str, ...] = ()


def read_threat(reader: Reader, path: PathTuple, value: object) -> ThreatSpec | None:
    """Return a threat, or None after noting what is wrong."""
    given = reader.mapping(path, value, ("norm", "eps"))
    found = reader.model(ThreatInput, path, given)
    if found is None:
        return None
    if found.norm == "linf" and found.eps > 1:
        hint = f"did you mean {found.eps:g}/255?"
        reader.problem((*path, "eps"), f"eps is in [0, 1] pixel units, not {found.eps:g}", hint)
        return None
    if found.norm == "l0" and found.eps % 1:
        hint = "a whole number, e.g. 10; a value is one channel of one pixel"
        reader.problem((*path, "eps"), f"eps of l0 is how many values may change, not {found.eps:g}", hint)
        return None
    return ThreatSpec(norm=found.norm, eps=found.eps)


def read_normalize(reader: Reader, value: object) -> NormalizeSpec | None:
    """Return the mean and deviation that `normalize:` gives; None where it is not there, or wrong and noted."""
    if value is None:
        return None
    found = reader.model(NormalizeInput, ("normalize",), reader.mapping(("normalize",), value, ("mean", "std")))
    if found is None:
        return None
    if len(found.mean) != len(found.std):
        reader.problem(("normalize",), f"{len(found.mean)} means but {len(found.std)} deviations", "one a channel each")
        return None
    return NormalizeSpec(mean=found.mean, std=found.std)


def read_train(reader: Reader, path: PathTuple, value: object) -> dict[str, Any]:
    """Return the fields of a TrainSpec that `train:` sets."""
    plugins = ("optimizer", "schedule", "augment")
    given = reader.mapping(path, value, (*TrainInput.model_fields, *plugins, "stages"))
    plain = reader.model(TrainInput, path, {key: item for key, item in given.items() if key in TrainInput.model_fields})
    found = plain.model_dump(exclude_none=True) if plain else {}
    for kind in ("optimizer", "schedule"):
        if given.get(kind) is not None:
            use = reader.use(kind, (*path, kind), given[kind])
            if use is not None:
                found[kind] = use
    if "augment" in given:
        found["augment"] = reader.uses("augmentation", (*path, "augment"), given["augment"])
    if given.get("stages") is not None:
        return found | _read_stages(reader, (*path, "stages"), given["stages"], found.get("epochs"))
    # Epochs of a variant's own, or `stages: null`, end the stages that it would inherit.
    return found | ({"stages": ()} if "epochs" in found or "stages" in given else {})


def _read_stages(reader: Reader, path: PathTuple, value: object, epochs: int | None) -> dict[str, Any]:
    """Return `stages` and the `epochs` that they add up to; nothing after noting what is wrong."""
    if not isinstance(value, list) or not value:
        reader.problem(path, "stages are a list, one item each", "e.g. [{epochs: 2, eps: 50%}, {epochs: 3}]")
        return {}
    read = []
    for number, item in enumerate(value):
        here = (*path, number)
        found = reader.model(StageInput, here, reader.mapping(here, item, tuple(StageInput.model_fields)))
        if found is not None:
            read.append(StageSpec(**found.model_dump()))
    if len(read) < len(value):
        return {}
    total = sum(stage.epochs for stage in read)
    if epochs is not None and epochs != total:
        reader.problem(path, f"the stages have {total} epochs together, but `epochs` is {epochs}", "drop `epochs`")
        return {}
    return {"stages": tuple(read), "epochs": total}
