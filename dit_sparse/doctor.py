"""What is installed here, which engines can run, and what will be used."""

import platform
from typing import Any

import torch

from .compare import PACKAGES, installed_version
from .engines import ENGINES
from .loading import boxed_pipeline, choose_device
from .metrics import Lpips


def examine() -> dict[str, Any]:
    """Versions, GPU, engines, LPIPS; every missing thing with its reason."""
    device = choose_device()
    engines = engine_states(device)
    return {
        "python": platform.python_version(),
        "packages": {
            name: installed_version(name) or "not installed" for name in (*PACKAGES, "flash-attn-4")
        },
        "gpu": gpu_state(),
        "engines": engines,
        "used": {
            "device": device,
            "dtype": "float32" if device == "cpu" else "bfloat16",
            "engine": used_engine(engines),
        },
        "lpips": Lpips().reason or "ready",
        "boxed_pipeline": box_state(),
    }


def gpu_state() -> str:
    if not torch.cuda.is_available():
        return "none" if torch.version.cuda else "none (this torch is a CPU build)"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def engine_states(device: str) -> dict[str, str]:
    return {name: engine.missing(device) or "ready" for name, engine in ENGINES.items()}


def used_engine(engines: dict[str, str]) -> str:
    """What engine="auto" takes; each is checked at its first use."""
    if engines["triton"] != "ready":
        return "torch"
    if engines["fa4"] != "ready":
        return "triton"
    return "fa4 for blocks of 128 tokens at head dim 128, else triton"


def box_state() -> str:
    try:
        return str(boxed_pipeline())
    except FileNotFoundError as error:
        return str(error)
