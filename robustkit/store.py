"""The run folder: atomic files, steps that are done or not, the lock and the events."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock, Timeout

from robustkit.errors import RobustkitError, UsageError

RECORD = "record.json"
MODEL = "model.safetensors"
ONNX = "model.onnx"
STATE = "state.pt"
PARTIAL = "partial.npz"
AGAIN = "partial-adaptive.npz"
"""Of the second attack of a step, through the view of a wrapped model."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made anew, so that no link which lies there is followed.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RobustkitError(f"{path}: cannot be written: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    # mkdir says so of a file where it wants a folder.
    if isinstance(error, FileExistsError):
        return f"{error.filename} is not a folder"
    return error.strerror or str(error)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_npz(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write arrays as a compressed npz, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **dict(arrays))
    write_atomic(path, buffer.getvalue())


class Store:
    """One run's folder. A step is done when its record.json exists and the files named in it are whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder; a second process gets a UsageError at once."""
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"{self.folder} is in use by another robustkit process; wait for it, or choose another --name"
            ) from error
        except OSError as error:
            raise UsageError(
                f"{self.folder}: cannot be the folder of a run: {_reason(error)}; choose another with --runs"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def step(self, key: str) -> Path:
        """Return the folder of a step."""
        return self.folder / "steps" / key

    def model_name(self, key: str) -> str:
        """Return the name of the file that a fit step's model is: ONNX where it was made that, else safetensors."""
        return ONNX if (self.step(key) / ONNX).is_file() else MODEL

    def record(self, key: str) -> dict[str, Any] | None:
        """Return the record of a finished step, or None where it is not done or a file of it is broken."""
        try:
            record = json.loads((self.step(key) / RECORD).read_bytes())
            files = record["files"]
            intact = all(_digest(self.step(key) / name) == digest for name, digest in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if intact else None

    def done(self, key: str) -> bool:
        """Say whether a step is done and whole."""
        return self.record(key) is not None

    def finish(self, key: str, record: Mapping[str, Any], files: tuple[str, ...] = ()) -> None:
        """Mark a step as done: its record is written last, with the digest of each of its files."""
        digests = {name: _digest(self.step(key) / name) for name in files}
        write_json(self.step(key) / RECORD, {**record, "files": digests})
        for name in (STATE, PARTIAL, AGAIN):
            (self.step(key) / name).unlink(missing_ok=True)

    def discard(self, key: str) -> None:
        """Remove a step."""
        shutil.rmtree(self.step(key), ignore_errors=True)

    def write_arrays(self, key: str, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write arrays as a compressed npz into a step's folder."""
        write_npz(self.step(key) / name, arrays)

    def read_arrays(self, key: str, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Read what write_arrays wrote."""
        # np.load of a path leaves the file open where the zip in it is broken.
        with (self.step(key) / name).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {array: arrays[array] for array in arrays.files}


class Partial:
    """What a step that takes long has so far: arrays that a stopped run goes on from."""

    def __init__(self, store: Store, key: str, name: str = PARTIAL) -> None:
        self._store, self._key, self._name = store, key, name

    def load(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return what was saved last, or None where there is nothing or it is broken."""
        try:
            return self._store.read_arrays(self._key, self._name)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
            return None

    def save(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Replace what was saved."""
        self._store.write_arrays(self._key, self._name, arrays)


class EventLog:
    """Append-only events.jsonl: one JSON object a line with `time` and `event`."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and path.stat().st_size > 0 and not _ends_in_newline(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RobustkitError(f"{path}: cannot be written: {_reason(error)}") from error
        if torn:
            self._file.write("\n")

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one event and flush it."""
        self._file.write(json.dumps({"time": round(time.time(), 3), "event": event, **values}, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget(folder: Path) -> None:
    """Remove a run's steps and results; refuses a folder that robustkit did not write.

    Raises:
        UsageError: the folder holds no events.jsonl, so it is not a run's.
    """
    if not folder.exists():
        return
    if not (folder / "events.jsonl").is_file():
        raise UsageError(f"{folder} is not the folder of a run: nothing was removed")
    with Store(folder).lock():
        shutil.rmtree(folder / "steps", ignore_errors=True)
        (folder / "results.json").unlink(missing_ok=True)
