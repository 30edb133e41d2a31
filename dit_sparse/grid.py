"""The video token grid, the text beside it, and the orders in which tokens are cut into blocks."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

TOKEN_ORDERS = ("raster", "tile", "curve", "patch")


@dataclass(frozen=True)
class VideoGrid:
    """Tokens of one video, and of the text that shares its self-attention.

    Args:
        frames, height, width: size of the latent video in tokens (after patching).
        text_tokens: text tokens in the same attention (0 where text has its own cross-attention).
        text_first: True if the text stands before the video (CogVideoX), False if after.
        conditioning_frames: leading frames that are given and not generated (an image to start
            from, reference images); like text they always attend and are always attended.
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text_first: bool = False
    conditioning_frames: int = 0

    def __post_init__(self):
        if min(self.frames, self.height, self.width) < 1 or self.text_tokens < 0:
            raise ValueError(f"a grid needs at least one token along each axis, got {self}")
        if not 0 <= self.conditioning_frames <= self.frames:
            raise ValueError(f"a grid has 0 to `frames` conditioning frames, got {self}")

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens

    @property
    def text_span(self) -> tuple[int, int]:
        """First text token and the one after the last, in the sequence."""
        start = 0 if self.text_first else self.video_tokens
        return start, start + self.text_tokens

    @property
    def video_span(self) -> tuple[int, int]:
        """First video token and the one after the last, in the sequence."""
        start = self.text_tokens if self.text_first else 0
        return start, start + self.video_tokens

    @property
    def conditioning_span(self) -> tuple[int, int]:
        """First token of the conditioning frames and the one after the last, in the sequence."""
        start = self.text_tokens if self.text_first else 0
        return start, start + self.conditioning_frames * self.height * self.width

    def num_blocks(self, block_size: int) -> int:
        return -(-self.tokens // block_size)

    def text_blocks(self, block_size: int) -> range:
        """Blocks that hold at least one text token; the mixed block counts as text."""
        return _blocks(*self.text_span, block_size)

    def conditioning_blocks(self, block_size: int) -> range:
        """Blocks that hold at least one token of a conditioning frame."""
        return _blocks(*self.conditioning_span, block_size)

    def forced_share(self, block_size: int) -> float:
        """Share of the blocks that every row reads: those of text and of conditioning frames."""
        forced = {*self.text_blocks(block_size), *self.conditioning_blocks(block_size)}
        return len(forced) / self.num_blocks(block_size)

    def block_lengths(self, block_size: int) -> Tensor:
        """Valid tokens of each block, (num_blocks,) int64; only the last can be short."""
        lengths = torch.full((self.num_blocks(block_size),), block_size)
        lengths[-1] = self.tokens - block_size * (len(lengths) - 1)
        return lengths


def _blocks(start: int, stop: int, block_size: int) -> range:
    return range(0) if start == stop else range(start // block_size, -(-stop // block_size))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for calls that autograd follows, too
def token_order(grid: VideoGrid, order: str, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Permutation into block order and its inverse, each (video_tokens,) int64 on the CPU.

    `video[permutation]` is in block order and `ordered[inverse]` in raster order again.
    The first frame stays in front as a segment of its own, since a causal VAE encodes it alone;
    or all the conditioning frames where there are more.

    Args:
        grid: the video; its text is never moved.
        order: "raster" (t, y, x), "tile" (3-D boxes of one block each), or "curve" (3-D Hilbert
            curve, by Skilling's transform: "Programming the Hilbert curve", 2004), or "patch"
            (frame after frame in flat boxes of one block: 8 x 16 tokens at 128, DraftAttention's).
            All take any grid; at ragged edges a box or a curve is cut, never padded.
        block_size: tokens in a block; sets the shape of a tile.
    """
    if order not in TOKEN_ORDERS:
        raise ValueError(f"unknown token order {order!r}, choose one of {', '.join(TOKEN_ORDERS)}")
    if order == "raster":
        permutation = torch.arange(grid.video_tokens)
    else:
        rank = {"curve": _hilbert_rank, "tile": _tile_rank, "patch": _patch_rank}[order]
        leading = max(grid.conditioning_frames, 1)
        first = VideoGrid(leading, grid.height, grid.width)
        parts = [rank(first, block_size).argsort(stable=True)]
        if grid.frames > leading:
            rest = VideoGrid(grid.frames - leading, grid.height, grid.width)
            parts.append(rank(rest, block_size).argsort(stable=True) + first.video_tokens)
        permutation = torch.cat(parts)
    return permutation, permutation.argsort()


def _coordinates(grid: VideoGrid) -> Tensor:
    """(t, y, x) of each raster token, (3, video_tokens) int64."""
    axes = [torch.arange(n) for n in (grid.frames, grid.height, grid.width)]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])


def tile_shape(frames: int, block_size: int) -> tuple[int, int, int]:
    """(t, y, x) size of the box that holds one block: near a cube, wider before taller."""
    shape = [1, 1, 1]
    room = [frames, block_size, block_size]
    axis = 2
    while shape[0] * shape[1] * shape[2] < block_size:
        if shape[axis] * 2 <= room[axis]:
            shape[axis] *= 2
        axis = (axis - 1) % 3
    return shape[0], shape[1], shape[2]


def _patch_rank(grid: VideoGrid, block_size: int) -> Tensor:
    return _tile_rank(grid, block_size, deep=1)


def _tile_rank(grid: VideoGrid, block_size: int, deep: int | None = None) -> Tensor:
    """Sort key that walks tile after tile, and raster order inside a tile; `deep` frames each."""
    coordinates = _coordinates(grid)
    size = torch.tensor(tile_shape(deep or grid.frames, block_size)).unsqueeze(1)
    tile, inner = coordinates // size, coordinates % size
    counts = [-(-n // s) for n, s in zip((grid.frames, grid.height, grid.width), size.flatten())]
    key = torch.zeros(grid.video_tokens, dtype=torch.int64)
    for index, count in [*zip(tile, counts), *zip(inner, size.flatten())]:
        key = key * count + index
    return key


def _hilbert_rank(grid: VideoGrid, block_size: int) -> Tensor:
    """Position of each token on the Hilbert curve of the smallest enclosing power-of-two box."""
    axes = [c for c, n in zip(_coordinates(grid), (grid.frames, grid.height, grid.width)) if n > 1]
    if not axes:
        return torch.zeros(grid.video_tokens, dtype=torch.int64)
    bits = max(int(axis.max()).bit_length() for axis in axes)
    axes = _axes_to_transpose([axis.clone() for axis in axes], bits)
    rank = torch.zeros(grid.video_tokens, dtype=torch.int64)
    for bit in reversed(range(bits)):
        for axis in axes:
            rank = rank * 2 + (axis >> bit & 1)
    return rank


def _axes_to_transpose(axes: list[Tensor], bits: int) -> list[Tensor]:
    """Skilling's transform from coordinates to the transposed Hilbert index."""
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for i, axis in enumerate(axes):
            inverted = (axis >> bit & 1).bool()
            swap = torch.where(inverted, 0, (axes[0] ^ axis) & low)
            axes[0] = torch.where(inverted, axes[0] ^ low, axes[0] ^ swap)
            if i:
                axes[i] = axis ^ swap
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for bit in reversed(range(1, bits)):
        flip = torch.where((axes[-1] >> bit & 1).bool(), flip ^ ((1 << bit) - 1), flip)
    return [axis ^ flip for axis in axes]


def order_patches(
    latents: Tensor, grid: VideoGrid, patch: tuple[int, int, int], permutation: Tensor
) -> Tensor:
    """Move the patches of a latent video (B, C, T, H, W) so that a patch embedding, which reads
    them one by one in raster order, gives its tokens in another order; `patch` is their size."""
    sizes = grid.frames, grid.height, grid.width
    used = [slice(n * p) for n, p in zip(sizes, patch)]  # as a convolution leaves out the rest
    split = latents[:, :, used[0], used[1], used[2]].reshape(
        *latents.shape[:2], *(n for pair in zip(sizes, patch) for n in pair)
    )  # (B, C, T, pt, H, ph, W, pw)
    tokens = split.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(5)[..., permutation]
    ordered = tokens.unflatten(5, sizes).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return ordered.flatten(6, 7).flatten(4, 5).flatten(2, 3)
