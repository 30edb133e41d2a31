"""Training-free sparse attention for video diffusion transformers in diffusers."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():  # a source tree: kernels/ lies one level up
    __path__.append(str(Path(__file__).parents[1]))

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from .api import (
        SparseAttention,
        UnsupportedPipelineError,
        available_methods,
        disable_sparse_attention,
        enable_sparse_attention,
        supported_pipelines,
    )
    from .attention import sparse_attention
    from .block_mask import BlockMask
    from .grid import VideoGrid
    from .patterns import (
        LLSA,
        MISA,
        AdaSpa,
        AdaSpaSampled,
        AnchorAttention,
        Auto,
        BiFormer,
        DFSAttn,
        DoubleSparsity,
        DraftAttention,
        FlexPrefill,
        HiP,
        LycheeDecode,
        MInference,
        MMInference,
        MoA,
        Radial,
        RandomBlocks,
        Rettention,
        RTPurbo,
        S2Attention,
        Scatterbrain,
        SeerAttention,
        SlidingTile,
        SolAttn,
        SpargeAttn,
        SparseD,
        SparseVDiT,
        SparseVideoGen,
        SparseVideoGen2,
        Window,
        XAttention,
    )

__version__ = "0.1.0"

__all__ = [
    "AdaSpa",
    "AdaSpaSampled",
    "AnchorAttention",
    "Auto",
    "BiFormer",
    "BlockMask",
    "DFSAttn",
    "DoubleSparsity",
    "DraftAttention",
    "FlexPrefill",
    "HiP",
    "LLSA",
    "LycheeDecode",
    "MISA",
    "MInference",
    "MMInference",
    "MoA",
    "RTPurbo",
    "Radial",
    "RandomBlocks",
    "Rettention",
    "S2Attention",
    "Scatterbrain",
    "SeerAttention",
    "SlidingTile",
    "SolAttn",
    "SpargeAttn",
    "SparseAttention",
    "SparseD",
    "SparseVDiT",
    "SparseVideoGen",
    "SparseVideoGen2",
    "UnsupportedPipelineError",
    "VideoGrid",
    "Window",
    "XAttention",
    "available_methods",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "sparse_attention",
    "supported_pipelines",
]

_CORE = {  # needs torch alone; every other name lives in api and needs diffusers
    "AdaSpa": "patterns",
    "AdaSpaSampled": "patterns",
    "AnchorAttention": "patterns",
    "Auto": "patterns",
    "BiFormer": "patterns",
    "BlockMask": "block_mask",
    "DFSAttn": "patterns",
    "DoubleSparsity": "patterns",
    "DraftAttention": "patterns",
    "FlexPrefill": "patterns",
    "HiP": "patterns",
    "LLSA": "patterns",
    "LycheeDecode": "patterns",
    "MISA": "patterns",
    "MInference": "patterns",
    "MMInference": "patterns",
    "MoA": "patterns",
    "RTPurbo": "patterns",
    "Radial": "patterns",
    "RandomBlocks": "patterns",
    "Rettention": "patterns",
    "S2Attention": "patterns",
    "Scatterbrain": "patterns",
    "SeerAttention": "patterns",
    "SlidingTile": "patterns",
    "SolAttn": "patterns",
    "SpargeAttn": "patterns",
    "SparseD": "patterns",
    "SparseVDiT": "patterns",
    "SparseVideoGen": "patterns",
    "SparseVideoGen2": "patterns",
    "VideoGrid": "grid",
    "Window": "patterns",
    "XAttention": "patterns",
    "sparse_attention": "attention",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers `--help` without loading torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_CORE.get(name, 'api')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
