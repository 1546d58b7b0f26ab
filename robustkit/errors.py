"""Errors for the person at the terminal: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the `robustkit` command."""

    OK = 0
    STEP_FAILED = 1
    USAGE = 2
    GATE_FAILED = 3
    INTERRUPTED = 130


class RobustkitError(Exception):
    """An error that is shown as a message, never as a traceback."""

    exit_code: ExitCode = ExitCode.STEP_FAILED


class UsageError(RobustkitError):
    """The command or the call asks for something that cannot be."""

    exit_code = ExitCode.USAGE


class DataError(RobustkitError):
    """A data set or one of its files is missing, broken or inconsistent; the message names the file."""


class NotDownloaded(DataError):
    """Data that a run downloads are not there yet."""


class ModelError(RobustkitError):
    """A model does not fit its input or its file; the message names the layer or the file."""


class TrainingError(RobustkitError):
    """Training cannot go on; the message says what was tried."""


class InternalError(RobustkitError):
    """Two results contradict each other, so that one of them is wrong; the run stops, as no figure can be trusted."""


class AttackError(RobustkitError):
    """An attack cannot run on this model or data; the message says why and what to use instead."""


@dataclass(frozen=True)
class Mark:
    """A place in a recipe. Line and column count from 1; `text` is the line, or the part of a long line around it,
    with the place at `offset` (from 0), and `width` is the caret's length."""

    file: str
    line: int
    column: int
    text: str = ""
    width: int = 1
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: what is wrong, where, and what to write instead."""

    message: str
    mark: Mark | None = None
    hint: str | None = None

    def __str__(self) -> str:
        head = f"{self.mark}: {self.message}" if self.mark else self.message
        lines = [head]
        if self.mark and self.mark.text:
            caret = " " * self.mark.offset + "^" * max(1, self.mark.width)
            lines += [f"    {self.mark.text}", f"    {caret}"]
        if self.hint:
            lines.append(f"    {self.hint}")
        return "\n".join(lines)


class RecipeError(UsageError):
    """A recipe that cannot be run, with every problem that was found in it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """Return `did you mean "x"?` for the options closest to `word`, or None where nothing is close."""
    close = difflib.get_close_matches(word, list(options), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in close)}?" if close else None
