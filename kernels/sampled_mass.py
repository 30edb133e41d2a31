"""Softmax mass of a few query rows of each block on every kv block, one Triton kernel.

    mass[n, m] = sum of exp(scale * q[i] . k[j] - lse[i]),   i sampled in q block n, j in kv block m

No dense attention has to run before, and keys are read once: for each row and kv block a program
keeps log2 of the sum of exponentials in a scratch buffer, which it turns into mass when the row's
log-sum-exp is known. With one row in eight that is a sixteenth of dense attention's products.

Launch grid: two programs for each multiprocessor, each with a part of the scratch buffer; they
share the tiles of sampled rows. A tile holds the rows of several q blocks, so that the matrix units
are full.
"""

import functools

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
from .tiles import SAMPLED, Tile, launch, tile_for


@triton.jit
def tile_parts(
    q,
    k,
    k_strides,
    batch,
    head,
    start,
    kv_len,
    scale_log2,
    running_max,
    running_sum,
    parts_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    # Stores log2 of the sums over the spans of one tile; the new maximum and sum of all so far.
    scores = tile_scores(
        q, k, k_strides, batch, head, start, kv_len,
        HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, MASKED,
    )  # fmt: skip
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2)  # (ROWS,)
    probs = tl.exp2(tl.fma(scores, scale_log2, -new_max[:, None]))
    sums = tl.sum(probs.reshape(ROWS, COLUMNS // SPAN, SPAN), 2)
    rows, spans = tl.arange(0, ROWS), start // SPAN + tl.arange(0, COLUMNS // SPAN)
    tl.store(
        parts_ptr + spans[None, :] * ROWS + rows[:, None],
        tl.log2(sums) + new_max[:, None],
        mask=(spans * SPAN < kv_len)[None, :],
    )
    return new_max, running_sum * tl.exp2(running_max - new_max) + tl.sum(sums, 1)


@triton.jit(do_not_specialize=["rows", "max_kv_len", "groups", "spans", "heads", "tiles", "total"])
def sampled_mass_kernel(
    q,
    k,
    mass_ptr,
    parts_ptr,
    kv_len_ptr,
    q_strides,
    k_strides,
    mass_strides,
    rows,
    max_kv_len,
    groups,
    spans,
    heads,
    tiles,
    total,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    parts_ptr += tl.program_id(0).to(tl.int64) * spans * ROWS  # (spans, ROWS)
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        tile_index, head, batch = work % tiles, work // tiles % heads, work // tiles // heads
        kv_len = max_kv_len
        if kv_len_ptr is not None:
            kv_len = tl.minimum(tl.load(kv_len_ptr + batch), max_kv_len)
        full_tiles = kv_len // COLUMNS
        first = tile_index * ROWS
        q_tile = load_tile(
            q, q_strides, batch, head, first, rows, HEAD_DIM, BLOCK_D, ROWS, DESCRIPTORS, True
        )
        running_max = tl.full((ROWS,), float("-inf"), tl.float32)
        running_sum = tl.zeros((ROWS,), tl.float32)
        for tile in tl.range(0, full_tiles):
            running_max, running_sum = tile_parts(
                q_tile, k, k_strides, batch, head, tile * COLUMNS, kv_len, scale_log2,
                running_max, running_sum, parts_ptr,
                HEAD_DIM, BLOCK_D, ROWS, COLUMNS, SPAN, DESCRIPTORS, False,
            )  # fmt: skip
        if kv_len % COLUMNS > 0:
            running_max, running_sum = tile_parts(
                q_tile, k, k_strides, batch, head, full_tiles * COLUMNS, kv_len, scale_log2,
                running_max, running_sum, parts_ptr,
                HEAD_DIM, BLOCK_D, ROWS, COLUMNS, SPAN, DESCRIPTORS, True,
            )  # fmt: skip
        # A row that does not exist, or has no key, has no mass: exp2(x - inf) = 0.
        exists = (first + tl.arange(0, ROWS) < rows) & (kv_len > 0)
        lse_log2 = tl.where(exists, running_max + tl.log2(running_sum), float("inf"))  # (ROWS,)

        group = tile_index * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP)
        mass_rows = (
            mass_ptr
            + batch.to(tl.int64) * mass_strides[0]
            + head.to(tl.int64) * mass_strides[1]
            + group.to(tl.int64) * mass_strides[2]
        )
        tl.debug_barrier()  # other threads wrote what a thread reads now
        for start in tl.range(0, spans, CHUNK):
            columns = start + tl.arange(0, CHUNK)
            parts = tl.load(
                parts_ptr + columns[:, None] * ROWS + tl.arange(0, ROWS)[None, :],
                mask=(columns * SPAN < kv_len)[:, None],
                other=float("-inf"),
            )  # (CHUNK, ROWS)
            probs = tl.exp2(parts - lse_log2[None, :])
            sums = tl.sum(probs.reshape(CHUNK, ROWS // GROUP, GROUP), 2)
            stored = (columns < spans)[:, None] & (group < groups)[None, :]
            tl.store(mass_rows[None, :] + columns[:, None], sums, mask=stored)
        tl.debug_barrier()  # the next tile writes there


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs share the tiles; in the interpreter a few."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def sampled_mass(
    query: Tensor,
    key: Tensor,
    rows_per_block: int,
    block_size: int,
    scale: float | None = None,
    kv_len: Tensor | None = None,
) -> Tensor:
    """Softmax mass that sampled queries of each q block put on each kv block.

    Args:
        query: `(B, R, H, D)`, the sampled rows alone, `rows_per_block` (a power of two) of each q
            block in turn; the last block may have fewer. bfloat16, float16 or float32.
        key: `(B, S_kv, H, D)`.
        block_size: tokens of a kv block: 32, 64 or 128.
        scale: softmax scale, 1 / sqrt(D) by default.
        kv_len: `(B,)` int32, valid keys of each sample; all by default.

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
    max_kv_len = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    check_scale(scale)
    if kv_len is not None:
        check_index("kv_len", kv_len, (batch,), (torch.int32,), query.device)
        kv_len = kv_len.contiguous()
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))

    path, dim = load_path(query, key), padded_head_dim(head_dim)
    descriptors = path == "descriptor"
    q_blocks, kv_blocks = triton.cdiv(rows, rows_per_block), triton.cdiv(max_kv_len, block_size)
    mass = query.new_empty(0)

    def run(tile: Tile) -> None:
        nonlocal mass
        # Parts of a block are summed afterwards.
        group, span = min(rows_per_block, tile.rows), min(block_size, tile.columns)
        groups, parts = q_blocks * (rows_per_block // group), block_size // span
        spans, tiles = triton.cdiv(max_kv_len, span), triton.cdiv(rows, tile.rows)
        whole = tiles * (tile.rows // group) >= groups and spans == kv_blocks * parts
        # What no tile covers must read 0 in the sum.
        allocate = torch.empty if whole else torch.zeros
        shape = batch, heads, groups, kv_blocks * parts
        mass = allocate(shape, dtype=torch.float32, device=query.device)
        total = tiles * heads * batch
        slots = min(total, programs(query.device))
        scratch = query.new_empty((slots, spans, tile.rows), dtype=torch.float32)
        sampled_mass_kernel[(slots,)](
            q=describe(query, tile.rows) if descriptors else query,
            k=describe(key, tile.columns) if descriptors else key,
            mass_ptr=mass,
            parts_ptr=scratch,
            kv_len_ptr=kv_len,
            q_strides=query.stride(),
            k_strides=key.stride(),
            mass_strides=mass.stride(),
            rows=rows,
            max_kv_len=max_kv_len,
            groups=groups,
            spans=spans,
            heads=heads,
            tiles=tiles,
            total=total,
            scale_log2=scale * LOG2_E,
            HEAD_DIM=head_dim,
            BLOCK_D=dim,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            GROUP=group,
            SPAN=span,
            CHUNK=32,
            DESCRIPTORS=descriptors,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    key_of = ("sampled_mass", query.device, query.dtype, dim, block_size, rows_per_block)
    with torch.cuda.device_of(query):
        launch(key_of, tile_for(SAMPLED, query.device, path, dim, (128, 128)), run)
    if mass.shape[2:] == (q_blocks, kv_blocks):
        return mass
    return mass.unflatten(3, (kv_blocks, -1)).unflatten(2, (q_blocks, -1)).sum((3, 5))
