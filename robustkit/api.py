"""The main job from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from robustkit.recipe.schema import load_recipe, parse_recipe
from robustkit.results import Results

if TYPE_CHECKING:
    from robustkit.pipeline import OnEvent


def run(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    runs: str | Path = "runs",
    name: str | None = None,
    on_event: OnEvent | None = None,
) -> Results:
    """Run a recipe and return its results; the report lies in the run's folder.

    `recipe` is a path, or the text of a recipe (anything with a line break). `overrides` are as on the command line,
    e.g. `["train.epochs=3"]`. Code that the recipe names is run: it is Python that calls this.

    Raises:
        RecipeError: the recipe has mistakes; the message names each with line and column.
        RobustkitError: a step failed; what was done before is kept, and the next call continues there.
    """
    from robustkit import pipeline
    from robustkit.errors import RobustkitError

    if isinstance(recipe, str) and "\n" in recipe:
        parsed, text = parse_recipe(recipe, overrides=overrides), recipe
    else:
        parsed = load_recipe(Path(recipe), overrides)
        text = Path(recipe).read_text(encoding="utf-8")
    folder = Path(runs) / (name or parsed.name)
    outcome = pipeline.run(parsed, folder, trust_plugins=True, on_event=on_event, recipe_text=text, overrides=overrides)
    if outcome.failures:
        lines = [f"{failure.step.variant} ({failure.step.kind}): {failure.message}" for failure in outcome.failures]
        raise RobustkitError("\n".join(lines))
    return outcome.results
