"""Keys of files by content, quick on the second call. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
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
    """Return a sha256 over the names and the contents of files, in the order given.

    Sizes and times of the files are looked up first: where they are as at an earlier call, its answer stands.
    """
    labels = list(names) if names is not None else [path.name for path in files]
    return _remembered(files, labels, lambda: _hash(files, labels))


def _hash(files: Sequence[Path], labels: Sequence[str]) -> str:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(file_hash, files))
    whole = hashlib.sha256()
    for label, digest in zip(labels, digests, strict=True):
        whole.update(f"{label}\0{digest}\n".encode())
    return whole.hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of one file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _remembered(files: Sequence[Path], labels: Sequence[str], compute: Callable[[], str]) -> str:
    stamp = hashlib.sha256()
    for path, label in zip(files, labels, strict=True):
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        stamp.update(f"{path.absolute()}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    index = cache_folder() / "fingerprints" / f"{stamp.hexdigest()}.json"
    try:
        known = json.loads(index.read_bytes())
        if isinstance(known, str) and len(known) == 64:
            return known
    except (OSError, ValueError):
        pass
    found = compute()
    from robustkit.store import write_json

    # A cache that cannot be written costs time, nothing else.
    with suppress(RobustkitError):
        write_json(index, found)
    return found
