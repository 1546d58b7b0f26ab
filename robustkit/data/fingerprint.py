"""The key of a recipe's data. Imports no torch and decodes nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from robustkit import registry
from robustkit.data.arrays import Source
from robustkit.recipe.spec import Use


def source_of(use: Use, folder: Path | None = None, plugins: Sequence[Path] = ()) -> Source:
    """Make the source that a recipe names; a relative `root` or `path` starts from the recipe's folder.

    `plugins` are the recipe's files, in which the source may be found by its bare name.
    """
    values = dict(use.parameters)
    for name in ("root", "path"):
        given = values.get(name)
        if isinstance(given, str) and folder is not None:
            values[name] = os.fspath(folder / Path(given).expanduser())
    return cast(Source, registry.create(registry.find("data", use.name, folder=folder, plugins=plugins), values))


def fingerprint(
    use: Use, *, cache: Path | None = None, folder: Path | None = None, plugins: Sequence[Path] = ()
) -> str:
    """Return a key of the data: equal content, size and limit give equal keys, wherever the files lie.

    Raises:
        DataError: a file or folder is missing.
    """
    entry = registry.find("data", use.name, folder=folder, plugins=plugins)
    source = source_of(use, folder, plugins)
    text = f"{source.fingerprint()}|size={source.size}|limit={source.limit}"
    if entry.origin != "builtin":
        # What a source of the user's own says of its data, an edit of its code may have made untrue.
        text += f"|source={registry.source_hash(entry)}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]
