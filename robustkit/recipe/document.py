"""A YAML file as plain values in which every key and value knows its line and column."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from robustkit.errors import Mark, Problem, RecipeError, UsageError

MAX_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 50
MAX_LINE = 200
LIBRARIES = ("torchattacks", "torchvision")
"""First parts of plugin names that have a dot."""
TAG = "tag:yaml.org,2002:"
Step = str | int
PathTuple = tuple[Step, ...]


@dataclass
class Document:
    """Plain values with the marks of their keys and values by path, e.g. ("variants", "a", "defenses", 0)."""

    file: str
    data: Any
    keys: dict[PathTuple, Mark] = field(default_factory=dict)
    values: dict[PathTuple, Mark] = field(default_factory=dict)

    def mark(self, path: PathTuple, *, key: bool = False) -> Mark | None:
        """Return the place of a path, or of the closest thing above it."""
        first, second = (self.keys, self.values) if key else (self.values, self.keys)
        for end in range(len(path), -1, -1):
            found = first.get(path[:end]) or second.get(path[:end])
            if found is not None:
                return found
        return None


def read_document(path: Path) -> Document:
    """Read a recipe file.

    Raises:
        RecipeError: the file is missing, no plain file, too large, not text, or not YAML; with file, line and column.
    """
    raw = _read(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        mark = Mark(str(path), line, column)
        raise RecipeError([Problem("not a text file in UTF-8", mark, "a recipe is YAML text")]) from error
    return parse_document(text, str(path))


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise RecipeError([Problem(f"{path}: this is a folder, not a recipe")])
    try:
        # Opening a pipe waits for a writer, and a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RecipeError([Problem(f"{path}: a pipe or a device, not a recipe", None, "save the recipe as a file")])
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([Problem(f"{path}: cannot be read: {error.strerror or error}")]) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError([Problem(f"{path}: too large; a recipe has at most {MAX_BYTES:,} bytes")])
    return raw


def parse_document(text: str, file: str) -> Document:
    """Parse the text of a recipe; `file` is what marks call it.

    Raises:
        RecipeError: not YAML, or YAML that no recipe needs (tags, duplicate keys, exploding anchors).
    """
    if len(text) > MAX_BYTES:
        raise RecipeError([Problem(f"{file}: {len(text):,} characters; a recipe has at most {MAX_BYTES:,}")])
    lines = text.splitlines()
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        raise RecipeError([_syntax(error, file, lines)]) from error
    except YAMLError as error:
        raise RecipeError([Problem(_reader_message(error, file))]) from error
    except RecursionError as error:
        raise RecipeError([Problem(f"{file}: nested too deep")]) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError) as error:
        # The YAML library lets a few broken inputs escape as plain exceptions.
        raise RecipeError([Problem(f"{file}: not valid YAML: {error}")]) from error
    if node is None:
        raise RecipeError(
            [Problem("the recipe is empty", Mark(file, 1, 1), "`robustkit init` writes one to start from")]
        )
    builder = _Builder(file, lines)
    document = Document(file, None, builder.keys, builder.values)
    document.data = builder.build(node, (), 0)
    if builder.problems:
        raise RecipeError(builder.problems)
    return document


def apply_overrides(document: Document, overrides: Sequence[str]) -> list[Problem]:
    """Put `a.b=value` pairs into the document; returns what is wrong with them."""
    problems = []
    for number, override in enumerate(overrides):
        file = f"override {override!r}"
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            problems.append(Problem(f"{file}: write it as key.sub=value"))
            continue
        try:
            value = parse_document(text, file).data if text.strip() else None
        except RecipeError as error:
            problems += [Problem(f"{file}: {problem.message}") for problem in error.problems]
            continue
        try:
            _put(document, tuple(name.strip().split(".")), value, Mark("override", 1, number + 1, override, 1))
        except UsageError as error:
            problems.append(Problem(f"{file}: {error}"))
    return problems


def _put(document: Document, names: tuple[str, ...], value: Any, mark: Mark) -> None:  # noqa: ANN401
    place: Any = document.data
    path: PathTuple = ()
    rest = names
    while True:
        step, rest = _next(place, path, rest)
        path = (*path, step)
        if not rest:
            break
        inner = _inside(place, path, rest)
        place[step] = inner
        place = inner
    place[step] = value
    for marks in (document.keys, document.values):
        for known in [known for known in marks if known[: len(path)] == path]:
            del marks[known]
        marks[path] = mark


def _next(place: Any, path: PathTuple, names: tuple[str, ...]) -> tuple[Step, tuple[str, ...]]:  # noqa: ANN401
    """Return the key or position that the first names stand for, and the names after it; keys may hold dots."""
    if isinstance(place, dict):
        known = (count for count in range(len(names), 0, -1) if ".".join(names[:count]) in place)
        count = next(known, 2 if names[0] in LIBRARIES and len(names) > 1 else 1)
        return ".".join(names[:count]), names[count:]
    where = ".".join(map(str, path)) or "the recipe"
    if not isinstance(place, list):
        raise UsageError(f"{where} is a single value; {names[0]!r} cannot be set in it")
    if not (names[0].isascii() and names[0].isdigit()) or int(names[0]) >= len(place):
        raise UsageError(f"{where} is a list of {len(place)}; {names[0]!r} is no position in it")
    return int(names[0]), names[1:]


def _inside(place: Any, path: PathTuple, names: tuple[str, ...]) -> Any:  # noqa: ANN401
    """Return what stands at the path's last step, ready to hold parameters."""
    step: Any = path[-1]
    found = place[step] if isinstance(place, list) else place.get(step)
    if not isinstance(found, str):
        return {} if found is None else found
    # A plugin that was written by its bare name takes parameters now, or makes way for another.
    if any(".".join(names[:count]) == found for count in range(1, len(names) + 1)):
        return {found: {}}
    if path == ("data",) and names[0] == "poison":
        return {found: None}
    if isinstance(place, list):
        raise UsageError(f"{'.'.join(map(str, path))} is {found!r}, not {names[0]!r}")
    return {}


class _Builder:
    """Turns YAML nodes into plain values and notes where each stood."""

    def __init__(self, file: str, lines: list[str]) -> None:
        self.file = file
        self.lines = lines
        self.keys: dict[PathTuple, Mark] = {}
        self.values: dict[PathTuple, Mark] = {}
        self.problems: list[Problem] = []
        self.count = 0

    def mark(self, node: Node) -> Mark:
        start, end = node.start_mark, node.end_mark
        text = self.lines[start.line] if start.line < len(self.lines) else ""
        width = end.column - start.column if end.line == start.line else len(text) - start.column
        return _mark(self.file, start.line, start.column, text, width)

    def build(self, node: Node, path: PathTuple, depth: int) -> Any:  # noqa: ANN401
        self.count += 1
        mark = self.mark(node)
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            why = "anchors that expand to too much" if self.count > MAX_NODES else "nested too deep"
            raise RecipeError([Problem(f"{why}; a recipe has at most {MAX_NODES:,} values", mark)])
        self.values[path] = mark
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, number), depth + 1) for number, item in enumerate(node.value)]
        return self._scalar(node, mark)

    def _mapping(self, node: MappingNode, path: PathTuple, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = self.mark(key_node)
            if not isinstance(key_node, ScalarNode):
                self.problems.append(Problem("a key must be a plain word", mark))
                continue
            key = str(key_node.value)
            if key in found:
                first = self.keys[*path, key]
                self.problems.append(Problem(f"duplicate key {key!r}", mark, f"it stands in line {first.line} already"))
                continue
            self.keys[*path, key] = mark
            found[key] = self.build(value_node, (*path, key), depth + 1)
        return found

    def _scalar(self, node: Node, mark: Mark) -> object:
        kind, text = str(node.tag).removeprefix(TAG), str(node.value)
        if kind == "str" or kind in ("timestamp", "merge", "value"):
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("true", "yes", "on", "y")
        try:
            if kind == "int":
                return (
                    int(text.replace("_", ""), 0)
                    if text.lower().lstrip("+-").startswith("0")
                    else int(text.replace("_", ""))
                )
            if kind == "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").replace(".NaN", "nan"))
        except ValueError:
            return text
        self.problems.append(Problem(f"the tag {node.tag} has no meaning in a recipe", mark, "write plain values"))
        return None


def _mark(file: str, line: int, column: int, text: str, width: int) -> Mark:
    start = max(0, column - MAX_LINE // 2) if len(text) > MAX_LINE else 0
    shown = text[start : start + MAX_LINE].replace("\t", " ")
    return Mark(file, line + 1, column + 1, shown, max(1, min(width, MAX_LINE)), column - start)


def _syntax(error: MarkedYAMLError, file: str, lines: list[str]) -> Problem:
    place = error.problem_mark or error.context_mark
    message = " ".join(str(part) for part in (error.context, error.problem) if part) or "not valid YAML"
    if place is None:
        return Problem(f"{file}: {message}")
    text = lines[place.line] if place.line < len(lines) else ""
    hint = None
    if "\t" in text[: place.column + 1]:
        message, hint = "a tab where YAML wants spaces", "indent with spaces"
    return Problem(message, _mark(file, place.line, place.column, text, 1), hint)


def _reader_message(error: YAMLError, file: str) -> str:
    return f"{file}: not a text file: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
