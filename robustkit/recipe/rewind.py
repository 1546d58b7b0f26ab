"""Which variants go back to early weights, and whose weights must be kept for that. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from robustkit.recipe.spec import Recipe, Use, VariantSpec

REWIND = "rewind"
SHRINK = "shrink"


def rewound_to(compress: Iterable[Use]) -> tuple[int, ...]:
    """Return the epochs that a variant's weights go back to; 0 is before the first one."""
    return tuple(int(use.parameters.get("epoch", 0)) for use in compress if use.name == REWIND)


def root_of(variant: VariantSpec, variants: Mapping[str, VariantSpec]) -> VariantSpec:
    """Return the variant that a chain of `from:` starts with."""
    while variant.parent is not None:
        variant = variants[variant.parent]
    return variant


def kept_epochs(recipe: Recipe, variant: VariantSpec) -> tuple[int, ...]:
    """Return the epochs, from 1, after which a variant's weights are kept because others go back to them."""
    if variant.parent is not None:
        return ()
    variants = {one.label: one for one in recipe.variants}
    found = {
        epoch
        for one in recipe.variants
        for epoch in rewound_to(one.compress)
        if epoch and root_of(one, variants).label == variant.label
    }
    return tuple(sorted(found))


def rewind_problem(
    compress: Iterable[Use],
    parent: VariantSpec | None,
    trains: bool,
    variants: Mapping[str, VariantSpec],
    model: Use | None,
) -> tuple[str, str] | None:
    """Return what is wrong with a variant's use of rewind and what to do, or None."""
    epochs = rewound_to(compress)
    if not epochs:
        return None
    if parent is None:
        return "rewind goes back to earlier weights, and the variant has none", "name the trained variant with `from:`"
    if not trains:
        return "rewind undoes the training, and the variant is not trained again", "add `train: {}`"
    root = root_of(parent, variants)
    last = root.train.epochs if root.train else 0
    if max(epochs) > last:
        return f"rewind to epoch {max(epochs)}, but {root.label!r} is trained for {last}", f"an epoch up to {last}"
    if model is not None and (model.name, model.parameters) != (root.model.name, root.model.parameters):
        return f"the early weights are those of {root.label!r}, another model", "rewind before the model grows"
    above: VariantSpec | None = parent
    while above is not None:
        if any(use.name == SHRINK for use in above.compress):
            return f"the early weights have channels that {above.label!r} removed", "rewind before `shrink`"
        above = variants[above.parent] if above.parent else None
    return None
