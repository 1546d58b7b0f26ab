"""What `import robustkit` offers."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import robustkit


def test_every_public_name_is_there_and_stays_when_all_modules_are_loaded() -> None:
    first = {name: getattr(robustkit, name) for name in robustkit.__all__}
    for module in pkgutil.walk_packages(robustkit.__path__, "robustkit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert {name: getattr(robustkit, name) for name in robustkit.__all__} == first
    assert callable(robustkit.evaluate)
    assert callable(robustkit.run)


def test_no_subpackage_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(robustkit.__path__)}
    assert not modules & set(robustkit.__all__)


def test_importing_robustkit_imports_no_torch() -> None:
    code = "import sys, robustkit; assert 'torch' not in sys.modules; dir(robustkit)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
