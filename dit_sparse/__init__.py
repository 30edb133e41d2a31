"""Training-free sparse attention for video diffusion transformers in diffusers."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():  # a source tree: kernels/ lies one level up
    __path__.append(str(Path(__file__).parents[1]))

from .attention import sparse_attention  # noqa: E402
from .block_mask import BlockMask  # noqa: E402
from .grid import VideoGrid  # noqa: E402
from .patterns import AdaSpa, RandomBlocks, Window  # noqa: E402

__version__ = "0.1.0"

_NEED_DIFFUSERS = (
    "SparseAttention",
    "UnsupportedPipelineError",
    "available_methods",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "supported_pipelines",
)

__all__ = [
    "AdaSpa",
    "BlockMask",
    "RandomBlocks",
    "VideoGrid",
    "Window",
    "sparse_attention",
    *_NEED_DIFFUSERS,
]


def __getattr__(name: str):
    """The core imports without diffusers; what patches a pipeline asks for it on first use."""
    if name in _NEED_DIFFUSERS:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
