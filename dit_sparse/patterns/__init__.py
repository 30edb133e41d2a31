"""The published methods, one file each, by the name a user types."""

from ..config import SparseConfig
from .adaspa import AdaSpa
from .adaspa_sampled import AdaSpaSampled
from .anchor import AnchorAttention
from .auto import Auto
from .biformer import BiFormer
from .dfsattn import DFSAttn
from .double_sparsity import DoubleSparsity
from .draftattention import DraftAttention
from .flexprefill import FlexPrefill
from .from_file import SUFFIX, method_in_file
from .hip import HiP
from .llsa import LLSA
from .lychee import LycheeDecode
from .minference import MInference, MMInference
from .misa import MISA
from .moa import MoA
from .radial import Radial
from .random import RandomBlocks
from .rettention import Rettention
from .rtpurbo import RTPurbo
from .s2 import S2Attention
from .scatterbrain import Scatterbrain
from .seerattention import SeerAttention
from .sol_attn import SolAttn
from .sparge import SpargeAttn
from .sparse_vdit import SparseVDiT
from .sparsed import SparseD
from .sta import SlidingTile
from .svg import SparseVideoGen
from .svg2 import SparseVideoGen2
from .window import Window
from .xattention import XAttention

METHODS: dict[str, type[SparseConfig]] = {
    "auto": Auto,
    "adaspa": AdaSpa,
    "adaspa-sampled": AdaSpaSampled,
    "draftattention": DraftAttention,
    "rettention": Rettention,
    "sparse-vdit": SparseVDiT,
    "dfsattn": DFSAttn,
    "sol-attn": SolAttn,
    "random": RandomBlocks,
    "window": Window,
    "svg": SparseVideoGen,
    "svg2": SparseVideoGen2,
    "sparge": SpargeAttn,
    "radial": Radial,
    "sta": SlidingTile,
    "xattention": XAttention,
    "minference": MInference,
    "mminference": MMInference,
    "flexprefill": FlexPrefill,
    "anchorattention": AnchorAttention,
    "sparsed": SparseD,
    "hip": HiP,
    "llsa": LLSA,
    "double-sparsity": DoubleSparsity,
    "lycheedecode": LycheeDecode,
    "moa": MoA,
    "s2-attention": S2Attention,
    "scatterbrain": Scatterbrain,
    "biformer": BiFormer,
    "misa": MISA,
    "rtpurbo": RTPurbo,
    "seerattention": SeerAttention,
}


def method_class(name: str) -> type[SparseConfig] | None:
    """The class that a name or the file of an own rule stands for; None where it is not known."""
    if name.endswith(SUFFIX):
        return method_in_file(name)
    return METHODS.get(name)
