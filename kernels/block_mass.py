"""Exact softmax mass of every (q block, kv block), one kernel: Triton, on Hopper in Gluon.

    mass[n, m] = sum of exp(scale * q[i] . k[j] - lse[i]),   i in q block n, j in kv block m

With the LSE of these very queries and keys a row of `mass` sums to the number of valid tokens in
its q block. With the LSE of an earlier step it does not, and nothing is clamped.

Launch grid: (q tiles, heads, batch). A program keeps one q tile and walks all keys, so this costs
a dense score pass without the values. A tile holds several blocks where they are smaller: sums
over warps are dear. A block larger than a tile is summed afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import (
    LOG2_E,
    check_block_size,
    check_index,
    check_scale,
    check_tensors,
    describe,
    load_path,
    load_tile,
    padded_head_dim,
    tile_scores,
)
from .tiles import MASS, Tile, gluon_runs, launch, tile_for


@triton.jit
def tile_mass(
    q,
    k,
    k_strides,
    batch,
    head,
    start,
    kv_len,
    scale_log2,
    lse_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    # Sums over groups of rows and spans of columns: (ROWS // GROUP, COLUMNS // SPAN)
    scores = tile_scores(
        q, k, k_strides, batch, head, start, kv_len,
        HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, MASKED,
    )  # fmt: skip
    probs = tl.exp2(tl.fma(scores, scale_log2, -lse_log2[:, None]))
    of_rows = tl.sum(probs.reshape(ROWS, COLUMNS // SPAN, SPAN), 2)
    return tl.sum(of_rows.reshape(ROWS // GROUP, GROUP, COLUMNS // SPAN), 1)


@triton.jit(do_not_specialize=["q_len", "kv_len", "num_groups", "num_spans"])
def block_mass_kernel(
    q,
    k,
    lse_ptr,
    mass_ptr,
    q_strides,
    k_strides,
    lse_strides,
    mass_strides,
    q_len,
    kv_len,
    num_groups,
    num_spans,
    scale_log2,
    log2_e,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    q_tile_index, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start = q_tile_index * ROWS
    q_tile = load_tile(
        q, q_strides, batch, head, q_start, q_len, HEAD_DIM, BLOCK_D, ROWS, DESCRIPTORS, True
    )

    rows = q_start + tl.arange(0, ROWS)
    lse_row = lse_ptr + batch.to(tl.int64) * lse_strides[0] + head.to(tl.int64) * lse_strides[1]
    lse = tl.load(lse_row + rows * lse_strides[2], mask=rows < q_len, other=float("inf"))
    # A row that attended to nothing, or does not exist, has no mass: exp2(x - inf) = 0.
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse) * log2_e  # (ROWS,)

    groups = q_tile_index * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
    spans = tl.arange(0, COLUMNS // SPAN)
    tile_ptr = (
        mass_ptr
        + batch.to(tl.int64) * mass_strides[0]
        + head.to(tl.int64) * mass_strides[1]
        + groups.to(tl.int64)[:, None] * mass_strides[2]
        + spans[None, :]
    )
    full_tiles = kv_len // COLUMNS
    for tile in tl.range(0, full_tiles):
        total = tile_mass(
            q_tile, k, k_strides, batch, head, tile * COLUMNS, kv_len, scale_log2, lse_log2,
            HEAD_DIM, BLOCK_D, ROWS, COLUMNS, GROUP, SPAN, DESCRIPTORS, False,
        )  # fmt: skip
        tl.store(tile_ptr + tile * (COLUMNS // SPAN), total, mask=groups[:, None] < num_groups)
    if kv_len % COLUMNS > 0:
        total = tile_mass(
            q_tile, k, k_strides, batch, head, full_tiles * COLUMNS, kv_len, scale_log2, lse_log2,
            HEAD_DIM, BLOCK_D, ROWS, COLUMNS, GROUP, SPAN, DESCRIPTORS, True,
        )  # fmt: skip
        spans += full_tiles * (COLUMNS // SPAN)
        stored = (groups < num_groups)[:, None] & (spans < num_spans)[None, :]
        tl.store(tile_ptr + full_tiles * (COLUMNS // SPAN), total, mask=stored)


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    block_size: tuple[int, int],
    scale: float | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Softmax mass that the queries of each q block put on each kv block.

    Args:
        query: `(B, S, H, D)`, bfloat16, float16 or float32, any strides.
        key: `(B, S_kv, H, D)`.
        lse: `(B, H, S)` float32, natural log, as attention returns it. It may come from an
            earlier step; rows of -inf count nothing.
        block_size: `(block_q, block_kv)` in tokens, each 32, 64 or 128.
        scale: softmax scale, 1 / sqrt(D) by default.
        tile: instead of the one in the shipped table, for benchmarks; not checked.

    Returns:
        `(B, H, Nq, Nkv)` in float32.
    """
    check_tensors(query=query, key=key)
    check_block_size(block_size)
    batch, q_len, heads, head_dim = query.shape
    kv_len = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    check_scale(scale)
    check_index("lse", lse, (batch, heads, q_len), (torch.float32,), query.device)
    lse = lse.expand(batch, heads, q_len)
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))

    path, dim = load_path(query, key), padded_head_dim(head_dim)
    descriptors = path == "descriptor"
    block_q, block_kv = block_size
    q_blocks, kv_blocks = triton.cdiv(q_len, block_q), triton.cdiv(kv_len, block_kv)
    mass = query.new_empty(0)

    def run(tile: Tile) -> None:
        nonlocal mass
        rows, columns = tile.rows, tile.columns
        # Parts are summed afterwards; a consumer of the Gluon kernel sums over its own 64 rows.
        group, span = min(block_q, 64 if tile.gluon else rows), min(block_kv, columns)
        q_tiles, kv_tiles = triton.cdiv(q_len, rows), triton.cdiv(kv_len, columns)
        shape = q_blocks * (block_q // group), kv_blocks * (block_kv // span)
        # Tiles past the end of the last, short block are not run: they must read 0 in the sum.
        whole = q_tiles * (rows // group) >= shape[0] and kv_tiles * (columns // span) >= shape[1]
        allocate = torch.empty if whole else torch.zeros
        mass = allocate((batch, heads, *shape), dtype=torch.float32, device=query.device)
        if tile.gluon:
            from .hopper_specialized_mass import hopper_specialized_mass

            parts = {"group": group, "span": span, "scale": scale, "tile": tile}
            return hopper_specialized_mass(query, key, lse, mass, **parts)
        block_mass_kernel[(q_tiles, heads, batch)](
            q=describe(query, rows) if descriptors else query,
            k=describe(key, columns) if descriptors else key,
            lse_ptr=lse,
            mass_ptr=mass,
            q_strides=query.stride(),
            k_strides=key.stride(),
            lse_strides=lse.stride(),
            mass_strides=mass.stride(),
            q_len=q_len,
            kv_len=kv_len,
            num_groups=shape[0],
            num_spans=shape[1],
            scale_log2=scale * LOG2_E,
            log2_e=LOG2_E,
            HEAD_DIM=head_dim,
            BLOCK_D=dim,
            ROWS=rows,
            COLUMNS=columns,
            GROUP=group,
            SPAN=span,
            DESCRIPTORS=descriptors,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    # What the Gluon kernel serves: 16 bits, whole head dims.
    gluon = descriptors and head_dim in (64, 128) and gluon_runs(query.device)
    of = MASS, query.device, path, dim, (128, 128)
    with torch.cuda.device_of(query):
        key_of = ("block_mass", query.device, query.dtype, dim, block_size)
        launch(key_of, tile or tile_for(*of, gluon, False), run, instead=tile_for(*of))
    if mass.shape[2:] == (q_blocks, kv_blocks):
        return mass
    return mass.unflatten(3, (kv_blocks, -1)).unflatten(2, (q_blocks, -1)).sum((3, 5))
