"""P6: images that no file of 8 bits holds."""

from __future__ import annotations

from torch import Tensor

from robustkit.evaluation.checks.batch import flag
from robustkit.results import Flag

GRID_TOLERANCE = 1e-3
OFF_GRID = 0.01


def off_grid(x: Tensor) -> list[Flag]:
    """P6: values in [0, 1] that are no multiple of 1/255: resized, augmented or normalized on the way here?

    What lies outside of [0, 1] is an error before any check.
    """
    if not x.numel():
        return []
    scaled = x * 255
    share = float(((scaled - scaled.round()).abs() > GRID_TOLERANCE).float().mean())
    if share <= OFF_GRID:
        return []
    message = (
        f"{share:.0%} of the pixel values are no multiple of 1/255: if the images were resized, augmented or "
        "normalized on the way here, do it inside the model, so that eps means what it says"
    )
    return [flag("P6", "note", message)]
