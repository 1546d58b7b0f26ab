"""Paths that stay in a run's folder, whatever a file in it says and wherever a link in it leads."""

from __future__ import annotations

from pathlib import Path

from robustkit.errors import UsageError


def inside(run: Path, name: str) -> Path:
    """Return the file `name` of a run's folder, links resolved.

    Raises:
        UsageError: it lies outside of the folder.
    """
    try:
        path = (run / name).resolve()
        within = path.is_relative_to(run.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UsageError(f"{run}: {name} cannot be followed: {error}") from error
    if not within:
        raise UsageError(f"{run}: {name} leads outside of the run's folder; nothing there is read or written")
    return path
