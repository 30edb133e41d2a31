"""Which tile a kernel works on and how it is compiled: a small shipped table, no timing.

A table maps (architecture family, load path, padded head dim) to tiles, best first. The first one
whose rows fit the logical block is taken; a smaller block makes a smaller tile. A GPU that refuses
it for want of shared memory or registers gets a smaller one, with one warning.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources

from . import dot

logger = logging.getLogger(__name__)


class Tile(NamedTuple):
    """The largest tile a program works on, and how it is compiled."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    gluon: bool = False  # instead of Triton; of a forward one whole kv block a tile

    def within(self, block_size: tuple[int, int]) -> "Tile":
        rows, columns = min(self.rows, block_size[0]), min(self.columns, block_size[1])
        return self._replace(rows=rows, columns=columns)

    def smaller(self) -> "Tile | None":
        """The next tile to try where this one needs more than the GPU has."""
        if self.gluon:
            return Tile(self.rows, min(self.columns, 64), 4, self.num_stages)
        if self.num_stages > 1:
            return self._replace(num_stages=self.num_stages - 1)
        if self.columns > 16:
            return self._replace(columns=self.columns // 2)
        if self.rows > 16:
            return self._replace(rows=self.rows // 2)
        return None


FAMILIES = {80: "ampere", 86: "ada", 89: "ada", 90: "hopper", 100: "blackwell"}
# IEEE float32 runs on the ordinary cores and holds whole operands in registers.
FLOAT32 = {
    16: [Tile(32, 32, 8, 2)],
    32: [Tile(32, 32, 8, 2)],
    64: [Tile(32, 32, 8, 2)],
    128: [Tile(32, 32, 8, 2)],
    256: [Tile(16, 32, 8, 1)],
}
FORWARD = {
    # What won on an H100 and an H200 (docs/log.md). Two stages of 128x64 leave room for a second
    # program on each multiprocessor, whose matrix products run beside the softmax of the first.
    ("hopper", "descriptor"): {
        16: [Tile(128, 64, 4, 3)],
        32: [Tile(128, 64, 4, 3)],
        64: [Tile(64, 128, 4, 2, True), Tile(64, 64, 4, 2, True), Tile(128, 64, 4, 3)],
        128: [
            Tile(128, 128, 8, 2, True),
            Tile(128, 64, 4, 2),
            Tile(64, 64, 4, 2, True),
            Tile(64, 64, 4, 3),
        ],
        256: [Tile(64, 64, 4, 2)],
    },
    ("other", "pointer"): {
        16: [Tile(128, 64, 4, 3)],
        32: [Tile(128, 64, 4, 3)],
        64: [Tile(128, 64, 4, 3)],
        128: [Tile(128, 64, 8, 2)],
        256: [Tile(32, 32, 4, 2)],
    },
    ("other", "float32"): FLOAT32,
}
# Of FP8, whose products leave the softmax to be waited for: more programs, less each.
GLUON_FP8 = [Tile(64, 128, 4, 2, True), Tile(64, 64, 4, 2, True)]
FORWARD_FP8 = FORWARD | {
    ("hopper", "descriptor"): {
        32: [Tile(64, 128, 4, 2), Tile(64, 64, 4, 3)],
        64: [*GLUON_FP8, Tile(64, 128, 4, 2), Tile(64, 64, 4, 3)],
        128: [*GLUON_FP8, Tile(64, 128, 4, 2), Tile(64, 64, 4, 4)],
        256: [Tile(64, 64, 4, 2)],
    },
}
# Forward tiles worth a try on another GPU, by head dim and block: `dit-sparse bench --tune`.
CANDIDATES = {
    (128, 128): [
        Tile(128, 128, 8, 2, True),
        Tile(128, 64, 4, 2),
        Tile(128, 64, 4, 3),
        Tile(128, 128, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 3),
        Tile(128, 32, 4, 4),
        Tile(64, 128, 4, 2),
        Tile(64, 64, 4, 3),
    ],
    (128, 64): [
        Tile(64, 64, 4, 2, True),
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 3),
        Tile(64, 64, 4, 4),
        Tile(64, 32, 4, 4),
        Tile(64, 32, 4, 5),
    ],
    (64, 128): [
        Tile(128, 128, 8, 2, True),
        Tile(64, 128, 4, 2, True),
        Tile(128, 64, 4, 2),
        Tile(128, 64, 4, 3),
        Tile(128, 64, 4, 4),
        Tile(128, 128, 4, 2),
        Tile(128, 128, 8, 2),
        Tile(128, 128, 8, 3),
    ],
    (64, 64): [
        Tile(64, 64, 4, 2, True),
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 3),
        Tile(64, 64, 4, 4),
        Tile(64, 32, 4, 4),
    ],
}
# The same of what searches run, and of the tail: `python benchmarks/kernels.py --sweep`.
SEARCH_CANDIDATES = [
    Tile(128, 128, 8, 2),
    Tile(128, 128, 8, 3),
    Tile(128, 64, 8, 3),
    Tile(128, 64, 4, 2),
    Tile(128, 64, 4, 3),
    Tile(64, 64, 4, 1),
    Tile(64, 64, 4, 3),
    Tile(64, 32, 4, 3),
]
MASS = {
    ("hopper", "descriptor"): {
        16: [Tile(128, 64, 4, 3)],
        32: [Tile(128, 64, 4, 3)],
        64: [Tile(128, 64, 8, 4, True), Tile(128, 64, 4, 3)],
        128: [Tile(128, 128, 8, 4, True), Tile(64, 64, 4, 1)],
        256: [Tile(64, 64, 4, 2)],
    },
    ("other", "pointer"): {
        16: [Tile(128, 128, 8, 2)],
        32: [Tile(128, 128, 8, 2)],
        64: [Tile(128, 128, 8, 2)],
        128: [Tile(128, 128, 8, 2)],
        256: [Tile(64, 64, 4, 2)],
    },
    ("other", "float32"): FLOAT32,
}

SAMPLED = {  # rows are sampled ones, of several blocks
    ("hopper", "descriptor"): {
        16: [Tile(128, 64, 4, 3)],
        32: [Tile(128, 64, 4, 3)],
        64: [Tile(128, 64, 4, 3)],
        128: [Tile(128, 128, 8, 3)],
        256: [Tile(64, 64, 4, 2)],
    },
    ("other", "pointer"): {
        16: [Tile(128, 64, 8, 2)],
        32: [Tile(128, 64, 8, 2)],
        64: [Tile(128, 64, 8, 2)],
        128: [Tile(128, 64, 8, 2)],
        256: [Tile(64, 64, 4, 2)],
    },
    ("other", "float32"): FLOAT32,
}

TAIL = {  # columns are means of kv blocks
    ("hopper", "descriptor"): {
        16: [Tile(128, 64, 4, 2)],
        32: [Tile(128, 64, 4, 2)],
        64: [Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)],
        128: [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)],
        256: [Tile(64, 64, 4, 2)],
    },
    ("other", "pointer"): {
        16: [Tile(128, 64, 4, 2)],
        32: [Tile(128, 64, 4, 2)],
        64: [Tile(128, 64, 4, 2)],
        128: [Tile(128, 64, 8, 2)],
        256: [Tile(32, 32, 4, 2)],
    },
    ("other", "float32"): FLOAT32,
}

_refused: dict[tuple, Tile] = {}  # what a GPU took instead of the tile of the table


@functools.cache
def family(device: torch.device) -> str:
    """Architecture family of the table: the GPU's own, "other" where it has no rows of its own."""
    if dot.INTERPRETING or torch.version.hip or device.type != "cuda":
        return "hopper" if dot.has_fast_descriptors(device) else "other"
    major, minor = torch.cuda.get_device_capability(device)
    return FAMILIES.get(major * 10 + minor, "other")


@functools.cache
def gluon_runs(device: torch.device) -> bool:
    """Whether a Gluon kernel may be tried: wgmma is Hopper's alone, and Gluon changes quickly."""
    if dot.INTERPRETING or torch.version.hip or device.type != "cuda":
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (3, 6)


def rows_of(table: dict, device: torch.device, path: str) -> dict[int, list[Tile]]:
    """Rows of the GPU's own family, else Hopper's for descriptors and the common ones."""
    nearest = "hopper" if path == "descriptor" else "other"
    return table.get((family(device), path)) or table[nearest, path]


def tile_for(
    table: dict,
    device: torch.device,
    path: str,
    head_dim: int,
    block_size: tuple[int, int],
    gluon: bool = False,
    whole_blocks: bool = True,
) -> Tile:
    """The tile of the table for tensors of this padded head dim in blocks of `block_size`.

    Args:
        gluon: whether tiles for a Gluon kernel may be taken.
        whole_blocks: of these only such as hold one whole kv block, as the forward needs.
    """
    tiles = [tile for tile in rows_of(table, device, path)[head_dim] if gluon or not tile.gluon]
    for tile in tiles:
        whole = tile.columns == block_size[1] or not (tile.gluon and whole_blocks)
        if tile.rows <= block_size[0] and whole:
            return tile.within(block_size)
    return tiles[-1].within(block_size)


def launch(
    key: tuple, tile: Tile, run: Callable[[Tile], None], instead: Tile | None = None
) -> None:
    """Call `run(tile)`; out of resources, retry with smaller tiles and remember what worked.

    Whatever else a Gluon kernel fails with, in another version of Triton, Triton's own runs then.

    Args:
        key: what decides how much the kernel needs: its name, device, dtype, head dim, block.
        instead: of Triton, where Gluon fails; by default as large a tile of the same kernel.
    """
    tile = _refused.get((key, tile), tile)
    wanted = tile
    while True:
        try:
            run(tile)
            break
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            smaller = instead if tile.gluon and instead else tile.smaller()
            if smaller is None or not (tile.gluon or isinstance(error, OutOfResources)):
                raise
            logger.debug("%s with %s: %s", key[0], tile, error)
            tile = smaller
    if tile != wanted:
        _refused[key, wanted] = tile
        logger.warning("%s does not run here with %s; it runs with %s", key[0], wanted, tile)
