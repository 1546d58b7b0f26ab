"""Classes as their source has them, with what they inherit, read with `ast`: nothing is imported and nothing runs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path

from robustkit.errors import UsageError
from robustkit.modules import module_file

FOREIGN = frozenset({"torch", "torchvision", *sys.stdlib_module_names})
"""Packages whose classes own no hooks and take no parameters of a recipe: not worth parsing."""
DEFENSE = Path(__file__).parent / "train" / "hooks.py"
PRUNING_MODULE = ["torch", "nn", "utils", "prune"]
PRUNING_FILE = ("torch", "nn", "utils", "prune.py")
MAX_STEPS = 30
"""How many imports and bases are followed, so that a circle of them ends."""
Found = tuple[Path, ast.ClassDef]


@cache
def _tree(path: Path, stamp: tuple[int, int]) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise UsageError(f"{path}{f':{line}' if line else ''}: not valid Python: {error}") from error


def parse(path: Path) -> ast.Module:
    """Return the tree of a file, the same one until the file changes.

    Raises:
        UsageError: it cannot be read, or is not valid Python.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    return _tree(path, (stat.st_mtime_ns, stat.st_size))


def definition(path: Path, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """Return the class or function of this name in a file; None where it is not defined."""
    for node in parse(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return None


def lineage(path: Path, name: str) -> tuple[Found, ...]:
    """Return a class and those that it inherits from, nearest first, each with its file.

    Bases are looked up in the file and through its imports. One that cannot be found there (made by a call, say) is
    left out, and so are torch's and the standard library's.
    """
    node = definition(path, name)
    found = list(_walk((path, node), MAX_STEPS)) if isinstance(node, ast.ClassDef) else []
    # A base of several comes after all of them, so its last place counts.
    last = {(file, one.name): (file, one) for file, one in reversed(found)}
    return tuple(reversed(last.values()))


def hooks_of(path: Path, name: str) -> tuple[str, ...]:
    """Return the names of the methods that a class has, other than those of robustkit's `Defense` as they are."""
    # `Defense` has every hook, so that no base behind it has a say.
    before = takewhile(lambda found: (found[0], found[1].name) != (DEFENSE, "Defense"), lineage(path, name))
    return tuple(dict.fromkeys(name for _, node in before for name in _members(node)))


def literal_of(path: Path, name: str, attribute: str) -> object:
    """Return the value of a class attribute that is written as a literal, nearest class first; None for any other."""
    for _, node in lineage(path, name):
        for item in node.body:
            targets = item.targets if isinstance(item, ast.Assign) else []
            targets = [item.target] if isinstance(item, ast.AnnAssign) else targets
            if any(isinstance(one, ast.Name) and one.id == attribute for one in targets):
                with suppress(ValueError, TypeError):
                    return ast.literal_eval(item.value)  # type: ignore[attr-defined]
                return None
    return None


def is_pruning_method(path: Path, name: str) -> bool:
    """Say whether a class is one of torch.nn.utils.prune, or inherits from one."""
    return any(
        file.parts[-4:] == PRUNING_FILE or any(_is_torchs(file, base) for base in node.bases)
        for file, node in lineage(path, name)
    )


def _is_torchs(path: Path, base: ast.expr) -> bool:
    """Say whether a base is a name of torch.nn.utils.prune, by the imports of its file."""
    parts = _parts(base)
    for node in ast.walk(parse(path)) if parts else ():
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            head = (alias.asname or alias.name).split(".")
            if parts[: len(head)] == head:
                module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                full = [*f"{module}{alias.name}".split("."), *parts[len(head) :]]
                if full[:-1] == PRUNING_MODULE:
                    return True
    return False


def _members(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            yield item.name
        elif isinstance(item, ast.Assign):
            yield from (target.id for target in item.targets if isinstance(target, ast.Name))


def _walk(found: Found, steps: int) -> Iterator[Found]:
    yield found
    path, node = found
    for base in node.bases:
        above = _dotted(path, _parts(base), steps - 1, below=node)
        if above is not None:
            yield from _walk(above, steps - 1)


def _parts(base: ast.expr) -> list[str]:
    """Return `a.b.C` or `a.b.C[T]` as its names; nothing for any other expression."""
    if isinstance(base, ast.Subscript):
        return _parts(base.value)
    if isinstance(base, ast.Attribute):
        before = _parts(base.value)
        return [*before, base.attr] if before else []
    return [base.id] if isinstance(base, ast.Name) else []


def _dotted(path: Path, parts: Sequence[str], steps: int, below: ast.ClassDef | None = None) -> Found | None:
    """Return the class that a dotted name in a file stands for; `below` is one that it cannot be."""
    if not parts or steps <= 0:
        return None
    # Another file that cannot be read is no mistake of the recipe's: what it defines is left out.
    with suppress(UsageError):
        node = definition(path, parts[0])
        if node is not None and node is not below:
            return (path, node) if isinstance(node, ast.ClassDef) and len(parts) == 1 else None
        for file, inside in _imported(path, parts[0]):
            found = _dotted(file, [*inside, *parts[1:]], steps - 1)
            if found is not None:
                return found
        if path.name == "__init__.py" and len(parts) > 1:
            child = _file(path.parent, parts[0])
            return _dotted(child, parts[1:], steps - 1) if child else None
    return None


def _imported(path: Path, name: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield the modules' files that a name in a file may be imported from, each with the name it has there."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                file = _module(path, node) if (alias.asname or alias.name) == name else None
                if file is not None:
                    yield file, [alias.name]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name if alias.asname else alias.name.partition(".")[0]
                file = _absolute(head) if (alias.asname or head) == name else None
                if file is not None:
                    yield file, []


def _module(path: Path, node: ast.ImportFrom) -> Path | None:
    if not node.level:
        return _absolute(node.module or "")
    if node.level > len(path.parents):
        return None
    return _file(path.parents[node.level - 1], *(node.module.split(".") if node.module else ()))


def _absolute(module: str) -> Path | None:
    return None if module.partition(".")[0] in FOREIGN else module_file(module)


def _file(folder: Path, *names: str) -> Path | None:
    base = folder.joinpath(*names)
    candidates = [base / "__init__.py", *([base.with_suffix(".py")] if names else [])]
    return next((one for one in candidates if one.is_file()), None)
