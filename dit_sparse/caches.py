"""Caches of diffusers that cannot be right beside sparse attention."""

from collections.abc import Iterable
from typing import Any

from torch import nn

FASTER_CACHE = (
    "FasterCache of diffusers leaves out half of the batch at some steps, and masks are found for"
    " the whole: disable it with transformer.disable_cache(), or use FirstBlockCache or MagCache"
)
BROADCAST = (
    "PyramidAttentionBroadcast of diffusers keeps one output for both calls of guidance, so that"
    " one prompt would get the attention of the other: generate without guidance, disable it with"
    " transformer.disable_cache(), or use FirstBlockCache or MagCache"
)


def refuse_faster_cache(transformer: nn.Module) -> None:
    if _has_hook(transformer, "faster_cache_denoiser"):
        raise RuntimeError(FASTER_CACHE)


def refuse_shared_broadcast(attentions: Iterable[Any]) -> None:
    """Where a step calls the transformer more than once."""
    if any(_has_hook(module, "pyramid_attention_broadcast") for module in attentions):
        raise RuntimeError(BROADCAST)


def _has_hook(module: Any, name: str) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(name) is not None
