"""The published methods, one file each, by the name a user types."""

from ..config import SparseConfig
from .adaspa import AdaSpa
from .adaspa_sampled import AdaSpaSampled
from .auto import Auto
from .dfsattn import DFSAttn
from .draftattention import DraftAttention
from .from_file import SUFFIX, method_in_file
from .random import RandomBlocks
from .rettention import Rettention
from .sol_attn import SolAttn
from .sparse_vdit import SparseVDiT
from .window import Window

METHODS: dict[str, type[SparseConfig]] = {
    "adaspa": AdaSpa,
    "adaspa-sampled": AdaSpaSampled,
    "draftattention": DraftAttention,
    "rettention": Rettention,
    "sparse-vdit": SparseVDiT,
    "dfsattn": DFSAttn,
    "sol-attn": SolAttn,
    "auto-preview": Auto,  # what method="auto" will mean
    "random": RandomBlocks,
    "window": Window,
}
AUTO = "adaspa"  # what method="auto" means


def method_class(name: str) -> type[SparseConfig] | None:
    """The class that a name or the file of an own rule stands for; None where it is not known."""
    if name.endswith(SUFFIX):
        return method_in_file(name)
    return METHODS.get(AUTO if name == "auto" else name)
