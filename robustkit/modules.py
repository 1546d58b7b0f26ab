"""Finding a module's file without importing it, and importing a user's file."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from robustkit.errors import UsageError


@cache
def package_folder(name: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UsageError(f"{name} is not installed")
    return Path(spec.origin).parent


def module_file(module: str) -> Path | None:
    """Return a module's file without importing it or its parents; None where there is none."""
    head, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(head)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for location in spec.submodule_search_locations or ():
        base = Path(location, *rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def source_of(made: Callable[..., Any]) -> Path | None:
    """Return the file that an imported class or function comes from; None for one that was typed in."""
    module = sys.modules.get(made.__module__)
    file = getattr(module, "__file__", None)
    return Path(file) if file else None


def code_of(made: Callable[..., Any]) -> str:
    """Return what a class or function typed into a notebook does, as text that is the same in every process.

    The code of its own methods and its plain attributes count; functions that it calls do not.
    """
    if not isinstance(made, type):
        return _code_text(made)
    return "\n".join(f"{name}: {_code_text(value)}" for name, value in sorted(vars(made).items()))


def _code_text(value: object) -> str:
    value = getattr(value, "fget", getattr(value, "__func__", value))
    if callable(value):
        value = inspect.unwrap(value)
    if isinstance(value, types.FunctionType):
        return f"{_code_text(value.__code__)} {_code_text(value.__defaults__)} {_code_text(value.__kwdefaults__)}"
    if isinstance(value, types.CodeType):
        return f"{value.co_code.hex()} {value.co_names} {value.co_varnames} {_code_text(value.co_consts)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_code_text, value))})"
    if isinstance(value, frozenset | set | dict):
        items = value.items() if isinstance(value, dict) else value
        return f"{{{', '.join(sorted(map(_code_text, items)))}}}"
    # An address in a repr would differ in every process.
    return repr(value) if isinstance(value, str | bytes | int | float | complex | None) else type(value).__name__


def absolute(path: Path, folder: Path | None) -> Path:
    """Return a path with ~ filled in, starting from `folder` (by default, the current one)."""
    path = path.expanduser()
    return path if path.is_absolute() else (folder or Path.cwd()) / path


def import_file(path: Path) -> Any:  # noqa: ANN401
    """Import a user's file and return the module; the same module again until the file changes.

    Raises:
        ImportError: it cannot be read, or is no Python file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImportError(f"{path}: {error.strerror}") from error
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + content).hexdigest()[:12]
    name = f"robustkit_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
