"""Keys of files by content, quick on the second call. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from robustkit.errors import DataError, RobustkitError


def cache_folder() -> Path:
    """Return the folder for decoded data: ROBUSTKIT_CACHE, else the user's cache folder."""
    import platformdirs

    named = os.environ.get("ROBUSTKIT_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("robustkit"))


def content_hash(files: Sequence[Path], names: Sequence[str] | None = None) -> str:
    """Return a sha256 over the names and the contents of files, in the order given."""
    labels = list(names) if names is not None else [path.name for path in files]
    whole = hashlib.sha256()
    for label, digest in zip(labels, file_hashes(files), strict=True):
        whole.update(f"{label}\0{digest}\n".encode())
    return whole.hexdigest()


def file_hashes(files: Sequence[Path]) -> list[str]:
    """Return the sha256 of each file, in the order given.

    Sizes and times of the files are looked up first: where they are as at an earlier call, its answer stands.
    """
    # In one order, so that another order of the same files finds the same answer.
    ordered = sorted(set(files))
    digests = dict(zip(ordered, _remembered(ordered), strict=True))
    return [digests[path] for path in files]


def file_hash(path: Path) -> str:
    """Return the sha256 of one file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _remembered(files: Sequence[Path]) -> list[str]:
    index = cache_folder() / "fingerprints" / f"{_stamp(files)}.json"
    try:
        known = json.loads(index.read_bytes())
        if len(known) == len(files) and all(isinstance(digest, str) and len(digest) == 64 for digest in known):
            return list(known)
    except (OSError, ValueError, TypeError):
        pass
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(file_hash, files))
    from robustkit.store import write_json

    # A cache that cannot be written costs time, nothing else.
    with suppress(RobustkitError):
        write_json(index, found)
    return found


def _stamp(files: Sequence[Path]) -> str:
    """Return a key of where the files lie, their sizes and their times."""
    stamp = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        stamp.update(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return stamp.hexdigest()
