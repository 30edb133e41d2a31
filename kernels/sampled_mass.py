"""Softmax mass of a few query rows of each block on every kv block, one Triton kernel.

    mass[n, m] = sum of exp(scale * q[i] . k[j] - lse[i]),   i sampled in q block n, j in kv block m

The rows take their LSE from a first pass over the keys, so that no dense attention has to run
before; a second pass sums. With one row in eight the two passes cost an eighth of dense attention.

Launch grid: (tiles of sampled rows, heads, batch). A tile holds the rows of several q blocks, so
that the matrix units are full.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import (
    LOG2_E,
    check_block_size,
    check_scale,
    check_tensors,
    describe,
    load_path,
    load_tile,
    online_softmax,
    padded_head_dim,
    tile_scores,
)
from .tiles import SAMPLED, Tile, launch, tile_for


@triton.jit
def sums_of_groups(scores, scale_log2, lse_log2, ROWS: tl.constexpr, GROUP: tl.constexpr):
    probs = tl.exp2(tl.fma(scores, scale_log2, -lse_log2[:, None]))
    return tl.sum(tl.sum(probs, 1).reshape(ROWS // GROUP, GROUP), 1)  # (ROWS // GROUP,)


@triton.jit(do_not_specialize=["rows", "kv_len", "groups"])
def sampled_mass_kernel(
    q,
    k,
    mass_ptr,
    q_strides,
    k_strides,
    mass_strides,
    rows,
    kv_len,
    groups,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    tile_index, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tile_index * ROWS
    q_tile = load_tile(
        q, q_strides, batch, head, first, rows, HEAD_DIM, BLOCK_D, ROWS, DESCRIPTORS, True
    )
    full_tiles = kv_len // COLUMNS

    running_max = tl.full((ROWS,), float("-inf"), tl.float32)
    running_sum = tl.zeros((ROWS,), tl.float32)
    for tile in tl.range(0, full_tiles):
        scores = tile_scores(
            q_tile, k, k_strides, batch, head, tile * COLUMNS, kv_len,
            HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, False,
        )  # fmt: skip
        _, _, running_max, running_sum = online_softmax(
            scores, scale_log2, running_max, running_sum
        )
    if kv_len % COLUMNS > 0:
        scores = tile_scores(
            q_tile, k, k_strides, batch, head, full_tiles * COLUMNS, kv_len,
            HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, True,
        )  # fmt: skip
        _, _, running_max, running_sum = online_softmax(
            scores, scale_log2, running_max, running_sum
        )
    # A row that does not exist has no mass: exp2(x - inf) = 0.
    exists = first + tl.arange(0, ROWS) < rows
    lse_log2 = tl.where(exists, running_max + tl.log2(running_sum), float("inf"))  # (ROWS,)

    group = tile_index * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
    mass_rows = (
        mass_ptr
        + batch.to(tl.int64) * mass_strides[0]
        + head.to(tl.int64) * mass_strides[1]
        + group.to(tl.int64) * mass_strides[2]
    )
    for tile in tl.range(0, full_tiles):
        scores = tile_scores(
            q_tile, k, k_strides, batch, head, tile * COLUMNS, kv_len,
            HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, False,
        )  # fmt: skip
        sums = sums_of_groups(scores, scale_log2, lse_log2, ROWS, GROUP)
        tl.store(mass_rows + tile, sums, mask=group < groups)
    if kv_len % COLUMNS > 0:
        scores = tile_scores(
            q_tile, k, k_strides, batch, head, full_tiles * COLUMNS, kv_len,
            HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, True,
        )  # fmt: skip
        sums = sums_of_groups(scores, scale_log2, lse_log2, ROWS, GROUP)
        tl.store(mass_rows + full_tiles, sums, mask=group < groups)


def sampled_mass(
    query: Tensor,
    key: Tensor,
    rows_per_block: int,
    block_size: int,
    scale: float | None = None,
) -> Tensor:
    """Softmax mass that sampled queries of each q block put on each kv block.

    Args:
        query: `(B, R, H, D)`, the sampled rows alone, `rows_per_block` (a power of two) of each q
            block in turn; the last block may have fewer. bfloat16, float16 or float32.
        key: `(B, S_kv, H, D)`.
        block_size: tokens of a kv block: 32, 64 or 128.
        scale: softmax scale, 1 / sqrt(D) by default.

    Returns:
        `(B, H, ceil(R / rows_per_block), Nkv)` in float32; a row sums to its number of queries.
    """
    check_tensors(query=query, key=key)
    check_block_size((block_size, block_size))
    if rows_per_block not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(
            f"rows_per_block must be a power of two up to 128, got {rows_per_block}. "
            "Sample one row in 8 of a block of 64."
        )
    batch, rows, heads, head_dim = query.shape
    kv_len = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    check_scale(scale)
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))

    path, dim = load_path(query, key), padded_head_dim(head_dim)
    descriptors = path == "descriptor"
    q_blocks, kv_blocks = triton.cdiv(rows, rows_per_block), triton.cdiv(kv_len, block_size)
    mass = query.new_empty(0)

    def run(tile: Tile) -> None:
        nonlocal mass
        group = min(rows_per_block, tile.rows)  # a q block of more rows is summed afterwards
        groups, parts = q_blocks * (rows_per_block // group), block_size // tile.columns
        tiles = triton.cdiv(rows, tile.rows)
        whole = tiles * (tile.rows // group) >= groups and parts == 1
        # What no tile covers must read 0 in the sum.
        allocate = torch.empty if whole else torch.zeros
        shape = batch, heads, groups, kv_blocks * parts
        mass = allocate(shape, dtype=torch.float32, device=query.device)
        sampled_mass_kernel[(tiles, heads, batch)](
            q=describe(query, tile.rows) if descriptors else query,
            k=describe(key, tile.columns) if descriptors else key,
            mass_ptr=mass,
            q_strides=query.stride(),
            k_strides=key.stride(),
            mass_strides=mass.stride(),
            rows=rows,
            kv_len=kv_len,
            groups=groups,
            scale_log2=scale * LOG2_E,
            HEAD_DIM=head_dim,
            BLOCK_D=dim,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            GROUP=group,
            DESCRIPTORS=descriptors,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    key_of = ("sampled_mass", query.device, query.dtype, dim, block_size, rows_per_block)
    with torch.cuda.device_of(query):
        launch(key_of, tile_for(SAMPLED, query.device, path, dim, (128, block_size)), run)
    if mass.shape[2:] == (q_blocks, kv_blocks):
        return mass
    return mass.unflatten(3, (kv_blocks, -1)).unflatten(2, (q_blocks, -1)).sum((3, 5))
