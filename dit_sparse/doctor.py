"""What is installed here, which engines can run, and what will be used."""

import importlib.util
import platform
from typing import Any

import torch

from .attention import why_not_triton
from .compare import PACKAGES, installed_version
from .loading import boxed_pipeline, choose_device
from .metrics import Lpips


def examine() -> dict[str, Any]:
    """Versions, GPU, engines, LPIPS; every missing thing with its reason."""
    device = choose_device()
    engines = engine_states(device)
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) or "not installed" for name in PACKAGES},
        "gpu": gpu_state(),
        "engines": engines,
        "used": {
            "device": device,
            "dtype": "float32" if device == "cpu" else "bfloat16",
            "engine": "triton" if engines["triton"] == "ready" else "torch",
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
    return {
        "torch": "ready",
        "triton": why_not_triton(device) or "ready",
        "flash-attn-4": other_engine("flash_attn.cute", "not installed"),
        "flex": other_engine("torch.nn.attention.flex_attention", "not in this torch"),
    }


def other_engine(module: str, missing: str) -> str:
    """State of an engine that `sparse_attention` does not call yet."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return "found, not used by this version" if found else missing


def box_state() -> str:
    try:
        return str(boxed_pipeline())
    except FileNotFoundError as error:
        return str(error)
