"""What options say of plugins, threats and numbers, read as a recipe reads them. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from robustkit import registry
from robustkit.errors import Problem, RecipeError, UsageError
from robustkit.params import parse_number
from robustkit.recipe.document import Document, parse_document
from robustkit.recipe.norms import check_attacks
from robustkit.recipe.parts import read_threat
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import ThreatSpec, Use


def read_data(text: str) -> Use:
    """Return the source of `--data`: a name, `name: {parameters}`, a folder of images or an npz file.

    Raises:
        UsageError: it is none of these; the message shows the mistake.
    """
    if text not in registry.names("data") and Path(text).exists():
        return Use(name="npz", parameters={"path": text}, label="npz") if Path(text).is_file() else _folder(text)
    return read_use("data", text, "--data")


def _folder(text: str) -> Use:
    return Use(name="image_folder", parameters={"root": text}, label="image_folder")


def read_use(kind: registry.Kind, text: str, option: str) -> Use:
    """Return the one plugin that an option names: `name`, or `name: {parameters}`."""
    reader = _reader(text, option)
    found = reader.use(kind, (option,), reader.document.data)
    if found is None or reader.problems:
        raise RecipeError(reader.problems)
    return found


def read_attacks(text: str, threat: ThreatSpec) -> tuple[Use, ...]:
    """Return the attacks of `--attacks`: `fgsm,cascade`, or with parameters `fgsm, pgd: {steps: 50}`.

    Raises:
        UsageError: an unknown attack or parameter, or one that does not work under the threat.
    """
    listed = text if text.lstrip().startswith("[") else f"[{text}]"
    reader = _reader(listed, "--attacks")
    found = reader.uses("attack", (), reader.document.data)
    check_attacks(reader, (), found, threat)
    if reader.problems:
        raise RecipeError(reader.problems)
    return found


def read_budget(text: str) -> ThreatSpec:
    """Return the threat of `--threat`: `linf:8/255`.

    Raises:
        UsageError: an unknown norm, or an eps that this norm cannot have.
    """
    norm, colon, eps = text.partition(":")
    number = parse_number(eps)
    if not colon or number is None:
        raise UsageError(f"--threat {text!r}: write it as norm:eps, e.g. linf:8/255, l2:0.5 or l0:10")
    reader = Reader(Document(file="--threat", data={}), None)
    found = read_threat(reader, (), {"norm": norm.strip(), "eps": number})
    if found is None or reader.problems:
        raise RecipeError(
            [Problem(f"--threat {text}: {problem.message}", hint=problem.hint) for problem in reader.problems]
        )
    return found


def read_numbers(text: str, option: str, count: int) -> tuple[float, ...]:
    """Return the numbers of an option, one a channel: `0.49,0.48,0.45`."""
    found = [parse_number(part) for part in text.split(",")]
    numbers = tuple(one for one in found if one is not None)
    if len(numbers) != len(found) or len(found) != count:
        raise UsageError(f"{option} {text!r}: {count} numbers with commas between are needed, one a channel")
    return numbers


def _reader(text: str, option: str) -> Reader:
    return Reader(parse_document(text, option), Path.cwd())
