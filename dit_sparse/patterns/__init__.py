"""The published methods, one file each, by the name a user types."""

from ..config import SparseConfig
from .adaspa import AdaSpa
from .random import RandomBlocks
from .window import Window

METHODS: dict[str, type[SparseConfig]] = {
    "adaspa": AdaSpa,
    "random": RandomBlocks,
    "window": Window,
}
AUTO = "adaspa"  # what method="auto" means
