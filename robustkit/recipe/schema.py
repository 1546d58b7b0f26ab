"""From a recipe file to a Recipe: every mistake found at once, each with its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from robustkit import registry
from robustkit.errors import Problem, RecipeError, did_you_mean
from robustkit.params import NonNegativeFloat, PositiveInt
from robustkit.recipe.document import Document, apply_overrides, parse_document, read_document
from robustkit.recipe.gates import RESERVED
from robustkit.recipe.judged import read_gates
from robustkit.recipe.norms import check_attacks, check_defenses
from robustkit.recipe.parts import Plain, read_normalize, read_threat, read_train
from robustkit.recipe.poison import read_poison, split_poison
from robustkit.recipe.quantized import check_certificates
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import RUNTIMES, EvaluateSpec, Recipe, Runtime, ThreatSpec, TrainSpec, Use
from robustkit.recipe.variants import read_variants

TOP = (
    "name",
    "seed",
    "device",
    "data",
    "model",
    "threat",
    "normalize",
    "train",
    "variants",
    "evaluate",
    "gates",
    "plugins",
)
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")
DEFAULT_ATTACKS: tuple[Any, ...] = ("noise", "fgsm", {"pgd": {"steps": 20}}, "cascade")


def _runtimes(value: object) -> object:
    if isinstance(value, bool) or value == "full":
        return value
    named = value if isinstance(value, list) else [value]
    for one in named:
        if one not in RUNTIMES:
            hint = (
                did_you_mean(str(one), ("full", *RUNTIMES)) or f"true, false, full, or a list of {', '.join(RUNTIMES)}"
            )
            raise ValueError(f"{one!r} is no runtime; {hint}")
    if not named or len(set(named)) < len(named):
        raise ValueError("a list of different runtimes is needed; e.g. [eager, onnxruntime]")
    return tuple(named)


LatencyInput = Annotated[bool | Literal["full"] | tuple[Runtime, ...], BeforeValidator(_runtimes)]


class EvaluateInput(Plain):
    """`evaluate:` without its plugins."""

    examples: PositiveInt | None = None
    batch_size: PositiveInt = 256
    eps_curve: tuple[NonNegativeFloat, ...] = ()
    latency: LatencyInput = True
    gallery: Annotated[int, Field(ge=0, le=64, strict=True)] = 8
    corruptions: bool = False
    audit: Annotated[int, Field(ge=0, strict=True)] = 0
    quantize_input: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file.

    Raises:
        RecipeError: with every problem found, each with file, line and column.
    """
    path = Path(path)
    return _recipe(read_document(path), path, path.parent, overrides)


def parse_recipe(
    text: str, *, file: str = "recipe.yaml", folder: Path | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Check the text of a recipe; relative paths in it start from `folder`.

    Raises:
        RecipeError: with every problem found, each with line and column.
    """
    path = (folder / file) if folder else None
    return _recipe(parse_document(text, file), path, folder, overrides)


def _recipe(document: Document, path: Path | None, folder: Path | None, overrides: Sequence[str]) -> Recipe:
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else "a single value"
        raise RecipeError([Problem(f"a recipe is a mapping of keys, not {kind}", document.mark(()))])
    problems = apply_overrides(document, overrides)
    reader = Reader(document, folder)
    top = reader.mapping((), document.data, TOP)
    reader.plugins = _plugins(reader, top.get("plugins"))
    given_threat = read_threat(reader, ("threat",), top.get("threat"))
    threat = given_threat or ThreatSpec()
    normalize = read_normalize(reader, top.get("normalize"))
    top["data"], planted = split_poison(top.get("data"))
    data = _required(reader, "data", top)
    poison = read_poison(reader, planted, data)
    model = _required(reader, "model", top)
    train = TrainSpec().model_copy(update=read_train(reader, ("train",), top.get("train")))
    variants = read_variants(reader, top.get("variants"), "variants" in top, model, threat, train)
    evaluate = _evaluate(reader, top.get("evaluate"), threat)
    check_certificates(reader, evaluate.certify, variants)
    if given_threat is not None:
        check_attacks(reader, ("evaluate", "attacks"), evaluate.attacks, threat)
        check_defenses(reader, variants)
    gates = read_gates(reader, top.get("gates"), evaluate, poisoned=planted is not None)
    name = _name(reader, top.get("name"), path)
    seeds = _seeds(reader, top.get("seed", 0))
    device = _device(reader, top.get("device", "auto"))
    if problems or reader.problems or data is None:
        raise RecipeError(sorted([*problems, *reader.problems], key=_place))
    return Recipe(
        name=name,
        path=path,
        seeds=seeds,
        device=device,
        data=data,
        poison=poison,
        threat=threat,
        normalize=normalize,
        variants=variants,
        evaluate=evaluate,
        gates=gates,
        plugins=reader.plugins,
    )


def _place(problem: Problem) -> tuple[int, int]:
    return (problem.mark.line, problem.mark.column) if problem.mark else (0, 0)


def _required(reader: Reader, kind: registry.Kind, top: dict[str, Any]) -> Use | None:
    if top.get(kind) is None:
        example = {"data": "data: digits", "model": "model: small_cnn"}[kind]
        reader.problem((kind,), f"`{kind}` is missing", f"e.g. {example}")
        return None
    return reader.use(kind, (kind,), top[kind])


def _evaluate(reader: Reader, value: object, threat: ThreatSpec) -> EvaluateSpec:
    plugins = ("attacks", "certify")
    given = reader.mapping(("evaluate",), value, (*EvaluateInput.model_fields, *plugins))
    plain = reader.model(EvaluateInput, ("evaluate",), {key: item for key, item in given.items() if key not in plugins})
    attacks = reader.uses("attack", ("evaluate", "attacks"), given.get("attacks", list(DEFAULT_ATTACKS)))
    certify = reader.uses("certificate", ("evaluate", "certify"), given.get("certify"))
    _check_labels(reader, "attacks", "an attack's", attacks, RESERVED)
    taken = (*RESERVED, *(use.label for use in attacks))
    _check_labels(reader, "certify", "a certificate's", certify, taken)
    if plain is not None and plain.audit and threat.norm == "l0":
        reader.problem(
            ("evaluate", "audit"), "AutoAttack works under linf, l2 or l1; the threat is l0", "leave audit out"
        )
    if plain is None:
        return EvaluateSpec(attacks=attacks, certify=certify)
    for number, eps in enumerate(plain.eps_curve):
        if threat.norm == "linf" and eps > 1:
            message = f"eps is in [0, 1] pixel units, not {eps:g}"
            reader.problem(("evaluate", "eps_curve", number), message, f"did you mean {eps:g}/255?")
        if threat.norm == "l0" and eps % 1:
            message = f"eps of l0 is how many values may change, not {eps:g}"
            reader.problem(("evaluate", "eps_curve", number), message, "a whole number")
    return EvaluateSpec(attacks=attacks, certify=certify, **plain.model_dump())


def _check_labels(reader: Reader, key: str, whose: str, uses: Sequence[Use], taken: Sequence[str]) -> None:
    """Note each label that stands for something else in gates, or that no gate could name."""
    for number, use in enumerate(uses):
        if use.label in taken or not SAFE_NAME.fullmatch(use.label):
            hint = f"give it another one: {{{use.name!r}: {{as: other-name}}}}"
            reader.problem(("evaluate", key, number), f"{use.label!r} cannot be {whose} label", hint)


def _plugins(reader: Reader, value: object) -> tuple[Path, ...]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    found = []
    for number, item in enumerate(items):
        path: tuple[str | int, ...] = ("plugins", number) if isinstance(value, list) else ("plugins",)
        if not isinstance(item, str):
            reader.problem(path, "a plugin is the path of a Python file")
            continue
        file = (reader.folder or Path.cwd()) / Path(item).expanduser()
        if not file.is_file():
            reader.problem(path, f"{file}: there is no such file")
            continue
        found.append(Path(item))
    return tuple(found)


def _name(reader: Reader, value: object, path: Path | None) -> str:
    if value is None:
        stem = path.stem if path else "run"
        return re.sub(r"[^A-Za-z0-9._+-]", "-", stem).lstrip("._+-")[:80] or "run"
    if not isinstance(value, str) or not SAFE_NAME.fullmatch(value):
        reader.problem(("name",), f"{value!r} cannot be a name", "letters, digits, . _ + - and at most 80 of them")
        return "run"
    return value


def _seeds(reader: Reader, value: object) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    good = bool(items) and all(type(item) is int and 0 <= item < 2**63 for item in items)
    if not good or len(set(map(str, items))) != len(items):
        reader.problem(
            ("seed",), "a seed is a whole number from 0, or a list of different ones", "e.g. seed: [0, 1, 2]"
        )
        return (0,)
    return tuple(items)


def _device(reader: Reader, value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        return value
    reader.problem(("device",), f"{value!r} is no device", "auto, cpu, cuda or cuda:0")
    return "auto"
