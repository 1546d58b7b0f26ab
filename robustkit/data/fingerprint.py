"""The key of a recipe's data. Imports no torch and decodes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from robustkit import registry
from robustkit.data.arrays import Downloads, Source
from robustkit.errors import DataError, RobustkitError
from robustkit.recipe.spec import Use


def source_of(use: Use, folder: Path | None = None, plugins: Sequence[Path] = ()) -> Source:
    """Make the source that a recipe names; a relative `root` or `path` starts from the recipe's folder.

    `plugins` are the recipe's files, in which the source may be found by its bare name.

    Raises:
        DataError: a source of the user's own cannot be made.
    """
    values = dict(use.parameters)
    for name in ("root", "path"):
        given = values.get(name)
        if isinstance(given, str) and folder is not None:
            values[name] = os.fspath(folder / Path(given).expanduser())
    entry = registry.find("data", use.name, folder=folder, plugins=plugins)
    with _blamed(entry):
        return cast(Source, registry.create(entry, values))


def scaling(source: Source) -> tuple[int | None, int | None]:
    """Return the size and the limit of a source; one of the user's own may do without."""
    return getattr(source, "size", None), getattr(source, "limit", None)


def fingerprint(
    use: Use,
    *,
    cache: Path | None = None,
    folder: Path | None = None,
    plugins: Sequence[Path] = (),
    fetch: bool = True,
) -> str:
    """Return a key of the data: equal source, content, size and limit give equal keys, wherever the files lie.

    Files that the recipe says to download are downloaded first; not so without `fetch`.

    Raises:
        DataError: a file or folder is missing, or a source of the user's own fails.
        NotDownloaded: the files are to be downloaded, and `fetch` is off.
    """
    entry = registry.find("data", use.name, folder=folder, plugins=plugins)
    source = source_of(use, folder, plugins)
    size, limit = scaling(source)
    with _blamed(entry):
        if fetch and isinstance(source, Downloads):
            source.fetch()
        # Two sources may read the same files and name their classes differently.
        text = f"{type(source).__name__}|{source.fingerprint()}|size={size}|limit={limit}"
    if entry.origin != "builtin":
        # What a source of the user's own says of its data, an edit of its code may have made untrue.
        text += f"|source={registry.source_hash(entry)}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def poisoned_fingerprint(key: str, use: Use, *, folder: Path | None = None, plugins: Sequence[Path] = ()) -> str:
    """Return the key of data with this key once they are poisoned: another one for each parameter of the poison."""
    source = registry.source_hash(registry.find("poison", use.name, folder=folder, plugins=plugins))
    text = f"{key}|poison={use.name}|{json.dumps(use.parameters, sort_keys=True, default=str)}|source={source}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextmanager
def _blamed(entry: registry.Entry) -> Iterator[None]:
    """Turn whatever a source of the user's own raises into a DataError that names it, and the line where it can."""
    try:
        yield
    except RobustkitError:
        raise
    except Exception as error:
        if entry.origin == "builtin":
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [
            frame.lineno for frame in frames if entry.file and Path(frame.filename).resolve() == entry.file.resolve()
        ]
        place = f" ({entry.file}:{lines[-1]})" if lines else ""
        raise DataError(f"data {entry.name!r} fails: {type(error).__name__}: {error}{place}") from error
