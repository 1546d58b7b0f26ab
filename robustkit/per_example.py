"""What a run writes of single test examples: which are right under what, and images for the report."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit.evaluated import Evaluated
from robustkit.recipe.plan import Plan
from robustkit.store import Store, write_npz

GALLERY = "gallery.npz"


def write_arrays(store: Store, one: Evaluated) -> str:
    """Write what is known of each test example of a variant; return the file's name inside the run folder."""
    name = f"arrays/{one.variant}-seed{one.seed}.npz"
    arrays: dict[str, NDArray[Any]] = {f"correct/{key}": values for key, values in one.correct.items()}
    arrays |= {f"distance/{label}": values for label, values in one.distances.items()}
    arrays |= {f"certified/{key}": values for key, values in one.proven.items()}
    if one.fooled is not None:
        arrays["success"] = one.fooled
    if one.radius is not None:
        arrays["tolerated"] = one.radius
    if one.labels is not None:
        arrays["labels"] = one.labels
    write_npz(store.folder / name, arrays)
    return name


def write_gallery(plan: Plan, store: Store, one: Evaluated) -> str | None:
    """Write the images that the report shows, and return their file's name; None where no attack kept any.

    Of each example: of the first attack that fools it, else of the one that lowers its confidence most.
    """
    found = []
    for label, record in one.attacks.items():
        if GALLERY in record["files"]:
            found.append(store.read_arrays(plan.attack_step(one.variant, one.seed, label).key, GALLERY))
    if not found:
        return None
    truth = found[0]["label"]
    fooled = np.stack([arrays["prediction_adversarial"] != truth for arrays in found])
    confidence = np.stack([arrays["confidence_adversarial"] for arrays in found])
    score = np.where(fooled, 2.0 + confidence, 1.0 - confidence)
    choice = score.argmax(axis=0)
    rows = np.arange(len(truth))
    chosen = {name: np.stack([arrays[name] for arrays in found])[choice, rows] for name in found[0]}
    delta = (chosen["adversarial"] - chosen["clean"].astype(np.float32) / 255).reshape(len(truth), -1)
    chosen["norm"] = np.linalg.norm(
        delta, ord={"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}[plan.recipe.threat.norm], axis=1
    )
    name = f"arrays/{one.variant}-seed{one.seed}-gallery.npz"
    write_npz(store.folder / name, chosen)
    return name
