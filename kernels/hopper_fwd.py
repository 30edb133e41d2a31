"""The forward of block_sparse_fwd for Hopper in Gluon: same lists, output and LSE, more overlap.

Triton finishes each product Q K^T before the P V of the same tile is started. Here both of
neighbouring tiles are started together, so that the tensor cores work on P V while the exponentials
of the next tile are computed; keys and values have buffers of their own, and the next loads start
as soon as one is free:

    start Q K[i+1] and P V[i];  wait for Q K[i+1], load K[i+3] into its buffer
    softmax of tile i+1;  wait for P V[i], load V[i+2] into its buffer, rescale

A tile holds one whole kv block (64 or 128 keys), so only the last tile can be cut by the end of the
keys. Launch grid and work order are those of block_sparse_fwd.

Limits: Hopper; bfloat16 and float16; head dim 64 or 128; blocks of 64 or 128; no kv_len. Gluon does
not run in Triton's interpreter; tests/gluon_on_cpu.py runs it without a GPU.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .dot import LN_2, LOG2_E
from .tiles import Tile

# Triton 3.9 has renamed it.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
GLUON_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@gluon.jit
def load(tensor, batch, head, start, buffers, barriers, slot, pred):
    # Rows start .. of one head into buffer `slot`; its barrier flips when they are there.
    barrier = barriers.index(slot)
    mbarrier.expect(barrier, tensor.block_type.nbytes, pred=pred)
    copy_tile(tensor, [batch, head, start, 0], barrier, buffers.index(slot), pred=pred)


@gluon.jit
def list_of_row(
    row, q_blocks, heads, kv_num_blocks_ptr, kv_indices_ptr, num_blocks_strides, indices_strides
):
    # Which row of the lists it is, how many kv blocks it keeps, and where they are listed.
    q_block, head, batch = row % q_blocks, row // q_blocks % heads, row // q_blocks // heads
    kept = gl.load(
        kv_num_blocks_ptr
        + batch.to(gl.int64) * num_blocks_strides[0]
        + head.to(gl.int64) * num_blocks_strides[1]
        + q_block.to(gl.int64) * num_blocks_strides[2]
    )
    indices_row = (
        kv_indices_ptr
        + batch.to(gl.int64) * indices_strides[0]
        + head.to(gl.int64) * indices_strides[1]
        + q_block.to(gl.int64) * indices_strides[2]
    )
    return q_block, head, batch, kept, indices_row


@gluon.jit
def lse_and_scale(running_max, running_sum, kept, ln_2):
    # What the softmax comes to: a row without kv blocks has LSE -inf and output 0.
    empty = kept == 0
    lse = (running_max + gl.log2(running_sum)) * ln_2
    lse = gl.where(empty, float("-inf"), lse)
    return lse, gl.where(empty, 0.0, 1.0 / running_sum)


@gluon.jit
def softmax(scores, scale_log2, running_max, running_sum):
    new_max = gl.maximum(running_max, gl.max(scores, 1) * scale_log2)
    rescale = gl.exp2(running_max - new_max)
    probs = gl.exp2(gl.fma(scores, scale_log2, -new_max[:, None]))
    return probs, rescale, new_max, running_sum * rescale + gl.sum(probs, 1)


@gluon.jit
def start_products(tile, q_tile, weights, acc, no_scores, k_shared, v_shared, k_ready, v_ready):
    # Q K of the next tile and P V of this one
    STAGES: gl.constexpr = k_shared.shape[0]
    COLUMNS: gl.constexpr = k_shared.shape[3]
    HEAD_DIM: gl.constexpr = k_shared.shape[4]
    slot, other = tile % STAGES, (tile + 1) % STAGES
    mbarrier.wait(k_ready.index(other), (tile + 1) // STAGES & 1)
    k_tile = k_shared.index(other).reshape([COLUMNS, HEAD_DIM]).permute([1, 0])
    scores_token = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(slot), tile // STAGES & 1)
    v_tile = v_shared.index(slot).reshape([COLUMNS, HEAD_DIM])
    return scores_token, warpgroup_mma(weights, v_tile, acc, is_async=True)


@gluon.jit
def advance(tile, state, q_tile, k, v, shared, ready, listed, no_scores, seen, scale_log2):
    # P V of this tile beside the exponentials of the next; `seen` are its columns, None is all.
    acc, weights, running_max, running_sum, start_2 = state
    k_shared, v_shared = shared
    k_ready, v_ready = ready
    batch, head, indices_row, index_stride, last = listed
    STAGES: gl.constexpr = k_shared.shape[0]
    COLUMNS: gl.constexpr = k_shared.shape[3]
    # start_2 belongs to tile + 2, ahead to tile + 3
    ahead = gl.load(indices_row + gl.minimum(tile + 3, last) * index_stride)
    slot, other = tile % STAGES, (tile + 1) % STAGES
    scores_token, acc_token = start_products(
        tile, q_tile, weights, acc, no_scores, k_shared, v_shared, k_ready, v_ready
    )
    scores = warpgroup_mma_wait(1, deps=(scores_token,))
    next_start = ahead.to(gl.int32) * COLUMNS
    load(k, batch, head, next_start, k_shared, k_ready, other, tile + 3 <= last)
    if seen is not None:
        scores = gl.where(seen[None, :], scores, float("-inf"))
    probs, rescale, running_max, running_sum = softmax(scores, scale_log2, running_max, running_sum)
    acc = warpgroup_mma_wait(0, deps=(acc_token,))
    load(v, batch, head, start_2, v_shared, v_ready, slot, tile + 2 <= last)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    weights = gl.convert_layout(probs.to(k.dtype), weights.type.layout)
    return acc, weights, running_max, running_sum, next_start


@gluon.jit
def store_rows(out_ptr, out_strides, batch, head, start, q_len, out, num_warps: gl.constexpr):
    # A tile of output into rows start .. of one head.
    ROWS: gl.constexpr = out.shape[0]
    HEAD_DIM: gl.constexpr = out.shape[1]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [num_warps, 1], [1, 0]
    )
    rows = start + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    out_base = out_ptr + batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[2]
    gl.store(
        out_base + rows.to(gl.int64)[:, None] * out_strides[1] + dims[None, :],
        gl.convert_layout(out, layout),
        mask=(rows < q_len)[:, None],
    )


@gluon.jit(do_not_specialize=["heads", "q_len", "kv_len"])
def hopper_fwd_kernel(
    q,
    k,
    v,
    out_ptr,
    lse_ptr,
    kv_num_blocks_ptr,
    kv_indices_ptr,
    order_ptr,
    out_strides,
    num_blocks_strides,
    indices_strides,
    heads,
    q_len,
    kv_len,
    scale_log2,
    ln_2,
    HEAD_DIM: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    num_warps: gl.constexpr,
):
    SPLIT: gl.constexpr = BLOCK_Q // ROWS
    STAGES: gl.constexpr = 2
    dtype: gl.constexpr = q.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, COLUMNS, 16]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    probs_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)

    q_blocks = (q_len + BLOCK_Q - 1) // BLOCK_Q
    row = gl.program_id(0) // SPLIT
    if order_ptr is not None:
        row = gl.load(order_ptr + row)
    q_block, head, batch, kept, indices_row = list_of_row(
        row, q_blocks, heads, kv_num_blocks_ptr, kv_indices_ptr, num_blocks_strides, indices_strides
    )
    q_start = q_block * BLOCK_Q + gl.program_id(0) % SPLIT * ROWS
    tiles = gl.maximum(kept, 1)  # an empty row works on a tile in vain

    q_shared = gl.allocate_shared_memory(dtype, [1, 1, 1, ROWS, HEAD_DIM], q.layout)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, COLUMNS, HEAD_DIM], k.layout)
    v_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, COLUMNS, HEAD_DIM], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
    fence_async_shared()

    # Starts of the tiles ahead, each read long before its load.
    last = tiles - 1
    start_0 = gl.load(indices_row).to(gl.int32) * COLUMNS
    start_1 = gl.load(indices_row + gl.minimum(1, last) * indices_strides[3]).to(gl.int32) * COLUMNS
    start_2 = gl.load(indices_row + gl.minimum(2, last) * indices_strides[3]).to(gl.int32) * COLUMNS
    last_start = gl.load(indices_row + last * indices_strides[3]).to(gl.int32) * COLUMNS
    load(q, batch, head, q_start, q_shared, q_ready, 0, True)
    load(k, batch, head, start_0, k_shared, k_ready, 0, True)
    load(v, batch, head, start_0, v_shared, v_ready, 0, True)
    load(k, batch, head, start_1, k_shared, k_ready, 1, tiles > 1)
    load(v, batch, head, start_1, v_shared, v_ready, 1, tiles > 1)

    q_tile = q_shared.index(0).reshape([ROWS, HEAD_DIM])
    no_scores = gl.full([ROWS, COLUMNS], 0.0, gl.float32, score_layout)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    running_sum = gl.full([ROWS], 0.0, gl.float32, row_layout)
    acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, out_layout)
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, score_layout))

    mbarrier.wait(q_ready.index(0), 0)
    mbarrier.wait(k_ready.index(0), 0)
    k_tile = k_shared.index(0).reshape([COLUMNS, HEAD_DIM]).permute([1, 0])
    scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    load(k, batch, head, start_2, k_shared, k_ready, 0, tiles > 2)
    scores = gl.where((start_0 + columns < kv_len)[None, :], scores, float("-inf"))
    probs, rescale, running_max, running_sum = softmax(scores, scale_log2, running_max, running_sum)
    weights = gl.convert_layout(probs.to(dtype), probs_layout)

    shared, ready = (k_shared, v_shared), (k_ready, v_ready)
    listed = (batch, head, indices_row, indices_strides[3], last)
    state = (acc, weights, running_max, running_sum, start_2)
    for tile in range(0, last - 1):
        state = advance(
            tile, state, q_tile, k, v, shared, ready, listed, no_scores, None, scale_log2
        )
    # The last tile, the only one that the end of the keys can cut. A branch in the loop would cost
    # every tile a selection of each score.
    for tile in range(gl.maximum(last - 1, 0), last):
        seen = last_start + columns < kv_len
        state = advance(
            tile, state, q_tile, k, v, shared, ready, listed, no_scores, seen, scale_log2
        )
    acc, weights, running_max, running_sum, start_2 = state

    mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
    v_tile = v_shared.index(last % STAGES).reshape([COLUMNS, HEAD_DIM])
    acc_token = warpgroup_mma(weights, v_tile, acc, is_async=True)
    out = warpgroup_mma_wait(0, deps=(acc_token,))

    lse, scale = lse_and_scale(running_max, running_sum, kept, ln_2)
    out = gl.where(kept == 0, 0.0, out)  # an empty row has read a block that may hold NaN
    out = out * gl.convert_layout(scale, out_row_layout)[:, None]

    rows = q_start + gl.arange(0, ROWS, row_layout)
    lse_row = lse_ptr + (batch.to(gl.int64) * heads + head) * q_len
    gl.store(lse_row + rows, lse, mask=rows < q_len)
    store_rows(out_ptr, out_strides, batch, head, q_start, q_len, out.to(dtype), num_warps)


@functools.cache  # every call asks for the same few, and making one takes as long as a launch
def shared_layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], GLUON_DTYPES[dtype])


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of `x (B, S, H, D)` as `(B, H, S, D)` in the layout that wgmma reads."""
    batch, seqlen, heads, head_dim = x.shape
    layout = shared_layout(rows, head_dim, x.dtype)
    strides = [
        stride if size > 1 else head_dim  # any legal stride serves an axis of length 1
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    shape = [batch, heads, seqlen, head_dim]
    block, strides = [1, 1, rows, head_dim], [strides[0], strides[2], strides[1], 1]
    return TensorDescriptor(x, shape, strides, block, layout)


def list_arguments(
    query: Tensor,
    key: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    lse: Tensor,
    order: Tensor | None,
    scale: float,
) -> dict[str, Any]:
    """What both kernels are launched with, beside tensors by descriptor and their tiles."""
    _, q_len, heads, head_dim = query.shape
    return {
        "lse_ptr": lse,
        "kv_num_blocks_ptr": kv_num_blocks,
        "kv_indices_ptr": kv_indices,
        "order_ptr": order,
        "num_blocks_strides": kv_num_blocks.stride(),
        "indices_strides": kv_indices.stride(),
        "heads": heads,
        "q_len": q_len,
        "kv_len": key.shape[1],
        "scale_log2": scale * LOG2_E,
        "ln_2": LN_2.value,
        "HEAD_DIM": head_dim,
    }


def hopper_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    block_size: tuple[int, int],
    scale: float,
    order: Tensor | None,
    tile: Tile,
) -> None:
    """Fill `out` and `lse`. Arguments as checked and prepared by `block_sparse_fwd`."""
    batch, q_len, heads, _ = query.shape
    q_blocks = -(-q_len // block_size[0])
    hopper_fwd_kernel[(q_blocks * (block_size[0] // tile.rows) * heads * batch,)](
        q=describe(query, tile.rows),
        k=describe(key, tile.columns),
        v=describe(value, tile.columns),
        out_ptr=out,
        out_strides=out.stride(),
        **list_arguments(query, key, kv_num_blocks, kv_indices, lse, order, scale),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK_Q=block_size[0],
        num_warps=tile.num_warps,
    )
