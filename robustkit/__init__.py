"""Train, defend, compress and attack image classifiers, and compare them side by side."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustkit.api import run as run
    from robustkit.artefacts import export as export
    from robustkit.attacks.threat import Attack as Attack
    from robustkit.attacks.threat import Threat as Threat
    from robustkit.compress.layer_curves import Sensitivity as Sensitivity
    from robustkit.compress.sensitivity import layer_sensitivity as layer_sensitivity
    from robustkit.data.split import Dataset as Dataset
    from robustkit.data.split import Split as Split
    from robustkit.errors import RecipeError as RecipeError
    from robustkit.errors import RobustkitError as RobustkitError
    from robustkit.evaluation.api import evaluate as evaluate
    from robustkit.evaluation.certified import certify as certify
    from robustkit.evaluation.corrupted import corrupted_accuracy as corrupted_accuracy
    from robustkit.evaluation.diagnose import diagnose as diagnose
    from robustkit.evaluation.minimum import minimum_distances as minimum_distances
    from robustkit.models.artefact import load_model as load  # noqa: F401
    from robustkit.models.weights import load_weights as load_weights
    from robustkit.recipe.schema import load_recipe as load_recipe
    from robustkit.registry import register as register
    from robustkit.results import Results as Results
    from robustkit.results import read_results as read_results
    from robustkit.scan import scan_layers as scan_layers
    from robustkit.train.hooks import Batch as Batch
    from robustkit.train.hooks import Defense as Defense
    from robustkit.train.hooks import Forward as Forward
    from robustkit.train.hooks import Step as Step

__version__ = "0.1.0"

_PUBLIC = {
    "Attack": "robustkit.attacks.threat:Attack",
    "Batch": "robustkit.train.hooks:Batch",
    "Dataset": "robustkit.data.split:Dataset",
    "Defense": "robustkit.train.hooks:Defense",
    "Forward": "robustkit.train.hooks:Forward",
    "RecipeError": "robustkit.errors:RecipeError",
    "Results": "robustkit.results:Results",
    "RobustkitError": "robustkit.errors:RobustkitError",
    "Sensitivity": "robustkit.compress.layer_curves:Sensitivity",
    "Split": "robustkit.data.split:Split",
    "Step": "robustkit.train.hooks:Step",
    "Threat": "robustkit.attacks.threat:Threat",
    "certify": "robustkit.evaluation.certified:certify",
    "corrupted_accuracy": "robustkit.evaluation.corrupted:corrupted_accuracy",
    "diagnose": "robustkit.evaluation.diagnose:diagnose",
    "evaluate": "robustkit.evaluation.api:evaluate",
    "export": "robustkit.artefacts:export",
    "layer_sensitivity": "robustkit.compress.sensitivity:layer_sensitivity",
    "load": "robustkit.models.artefact:load_model",
    "load_recipe": "robustkit.recipe.schema:load_recipe",
    "load_weights": "robustkit.models.weights:load_weights",
    "minimum_distances": "robustkit.evaluation.minimum:minimum_distances",
    "read_results": "robustkit.results:read_results",
    "register": "robustkit.registry:register",
    "run": "robustkit.api:run",
    "scan_layers": "robustkit.scan:scan_layers",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import robustkit` stays quick and needs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'robustkit' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return list(__all__)
