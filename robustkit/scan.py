"""Sensitivity scans of variants of a run: how much each layer bears before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustkit.attacks.gradient import Pgd
from robustkit.compress.layer_curves import Sensitivity
from robustkit.compress.sensitivity import SPARSITIES, Progress, layer_sensitivity
from robustkit.data.split import fixed_subset
from robustkit.errors import UsageError
from robustkit.report.inside import inside
from robustkit.report.sensitivity import drawn
from robustkit.run_folder import data_of, model_file, model_of, recipe_of, row_of
from robustkit.store import write_atomic
from robustkit.workbench import choose_device, threat_of

FOLDER = "sensitivity"


@dataclass(frozen=True)
class Scanned:
    """A scan, of which variant and seed, and its files: JSON, SVG and PNG."""

    sensitivity: Sensitivity
    variant: str
    seed: int
    files: tuple[Path, ...]


def scan_layers(
    run: str | Path,
    variant: str,
    method: str = "global_l1",
    *,
    sparsities: Sequence[float] = SPARSITIES,
    examples: int = 500,
    steps: int = 10,
    seed: int | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    trust_plugins: bool = False,
    on_progress: Progress | None = None,
) -> Scanned:
    """Scan the layers of a variant of a run (its folder) and write what was found, as JSON, SVG and PNG.

    On at most `examples` images of the validation split, under the run's threat by PGD with `steps` steps; inference
    wrappers are left off. `seed`: default the run's first. `out`: a folder, default RUN/sensitivity. A run on code of a
    user's own needs `trust_plugins=True`: that code is run.

    Raises:
        UsageError: no such run, variant, seed or method; there are no validation images; code is not trusted.
        ModelError: the model's file is broken.
        DataError: the run's data are no longer there.
    """
    folder = Path(run)
    row, recipe = row_of(folder, variant, seed), recipe_of(folder)
    place = choose_device(device)
    model = model_of(model_file(folder, row), recipe, trust_plugins, wrapped=False).to(place)
    data = data_of(recipe, row.name, trust_plugins)
    shown = fixed_subset(data.validation, examples)
    if not len(shown):
        raise UsageError(f"{folder}: the run held out no images to validate on; set train.validation")
    found = layer_sensitivity(
        model,
        shown.images,
        shown.labels,
        threat_of(recipe.threat),
        method=method,
        sparsities=sparsities,
        attack=Pgd(steps=steps),
        train=data.train,
        seed=row.seed,
        batch_size=recipe.evaluate.batch_size,
        on_progress=on_progress,
    )
    name = f"{row.name}-seed{row.seed}-{method}"
    files = {
        "json": (found.model_dump_json(indent=2) + "\n").encode(),
        "svg": drawn(found, "svg"),
        "png": drawn(found, "png"),
    }
    paths = []
    for kind, content in files.items():
        path = Path(out) / f"{name}.{kind}" if out is not None else inside(folder, f"{FOLDER}/{name}.{kind}")
        write_atomic(path, content)
        paths.append(path)
    return Scanned(found, row.name, row.seed, tuple(paths))
