"""Where and with what a benchmark ran: the part of every result file that says so."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and command; `commit` where there is no git."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(sys.argv),
        "gpu": gpu,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version_of(name) for name in ("triton", "diffusers", "flash-attn-4")},
        "commit": commit or commit_here(),
    }


def folders_of_fa4(folder: Path) -> list[str]:
    """Where flash-attn-4 and its compiler lie in a folder that pip --target filled."""
    packages = folder / "nvidia_cutlass_dsl"
    return [str(folder), str(packages / "dsl_packages"), str(packages / "python_packages")]


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_here() -> str:
    """The commit that is checked out, "unknown" without git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
