"""What ran on what: versions, machine, source revision, command. No torch is imported that is not imported already."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from robustkit import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "torchattacks",
    "torch-pruning",
    "torchao",
    "onnx",
    "onnxruntime",
    "numpy",
    "scipy",
    "scikit-learn",
)


def collect(command: list[str] | None = None) -> dict[str, Any]:
    """Return the provenance of a run: no host name, no user name, no credentials."""
    return {
        "robustkit": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "git": git_revision(Path.cwd()),
        "cpu": cpu(),
        "torch": torch_setup(),
    }


def version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Return commit and dirtiness of the folder's repository, or None outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


def cpu() -> dict[str, Any]:
    """Return the processor's name, its cores, and the vector extensions that matter for latency."""
    text = _read(Path("/proc/cpuinfo"))
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    present = set(flags.group(1).split()) if flags else set()
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
    return {
        "name": name.group(1).strip() if name else platform.processor(),
        "cores": os.cpu_count(),
        "extensions": [flag for flag in wanted if flag in present],
    }


def torch_setup() -> dict[str, Any] | None:
    """Return threads and devices of torch where it is imported already, else None."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
