"""hopper_fwd for blocks of 128x128 with a task for each warp group, as flash-attn-4 has them.

One program is one row of the lists, and holds a multiprocessor alone. Its warps are
- a producer, one warp: walks the list and loads keys and values into STAGES buffers of each;
- two consumers, four warps with 64 queries each: as in hopper_fwd, Q K[i+1] and P V[i] are started
  together. The softmax of one consumer runs beside its own P V and beside the other's products.

A buffer has two barriers: `full` flips when its load is there, `free` when both consumers have
read it. The list is read backwards: the tile that the end of the keys can cut comes first, before
the loop.

Limits: those of hopper_fwd, and blocks of 128x128 only.
"""

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

from .hopper_fwd import (
    describe,
    list_arguments,
    list_of_row,
    load,
    lse_and_scale,
    softmax,
    start_products,
)
from .tiles import Tile

# Triton 3.9 has renamed it.
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BLOCK = 128
ROWS = 64  # of a consumer
# 65,536 registers over 12 warps (the producer's warp group is filled up) in steps of 8.
MAX_REGISTERS = 168


@gluon.jit
def read_index(indices_row, stride, tile, kept, tiles):
    # Where the keys of a tile start; the list is walked backwards, an empty one reads block 0.
    index = gl.load(indices_row + (tiles - 1 - tile) * stride, mask=tile < kept, other=0)
    return index.to(gl.int32) * 128


@gluon.jit
def produce(
    q,
    k,
    v,
    buffers,
    barriers,
    place,
    listed,
    STAGES: gl.constexpr,
):
    batch, head, q_start = place
    indices_row, index_stride, kept = listed
    q_shared, k_shared, v_shared = buffers
    q_full, k_full, k_free, v_full, v_free = barriers
    tiles = gl.maximum(kept, 1)
    load(q, batch, head, q_start, q_shared, q_full, 0, True)
    load(q, batch, head, q_start + 64, q_shared, q_full, 1, True)
    start = read_index(indices_row, index_stride, 0, kept, tiles)
    load(k, batch, head, start, k_shared, k_full, 0, True)
    ahead = read_index(indices_row, index_stride, 1, kept, tiles)
    for tile in range(1, tiles):
        # Consumers free K[tile] before V[tile - 1]. A fresh barrier lets phase 1 pass.
        before, start = start, ahead
        ahead = read_index(indices_row, index_stride, tile + 1, kept, tiles)
        slot = tile % STAGES
        mbarrier.wait(k_free.index(slot), (tile // STAGES + 1) & 1)
        load(k, batch, head, start, k_shared, k_full, slot, True)
        slot = (tile - 1) % STAGES
        mbarrier.wait(v_free.index(slot), ((tile - 1) // STAGES + 1) & 1)
        load(v, batch, head, before, v_shared, v_full, slot, True)
    slot = (tiles - 1) % STAGES
    mbarrier.wait(v_free.index(slot), ((tiles - 1) // STAGES + 1) & 1)
    load(v, batch, head, start, v_shared, v_full, slot, True)


@gluon.jit
def consume(
    HALF: gl.constexpr,
    out,
    lse_row,
    buffers,
    barriers,
    place,
    numbers,
    STAGES: gl.constexpr,
):
    ROWS: gl.constexpr = 64
    COLUMNS: gl.constexpr = 128
    HEAD_DIM: gl.constexpr = out.block_type.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    probs_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)

    q_shared, k_shared, v_shared = buffers
    q_full, k_full, k_free, v_full, v_free = barriers
    batch, head, q_start = place
    last_start, kept, q_len, kv_len, scale_log2, ln_2 = numbers
    dtype: gl.constexpr = q_shared.dtype
    tiles = gl.maximum(kept, 1)
    last = tiles - 1
    q_tile = q_shared.index(HALF).reshape([ROWS, HEAD_DIM])
    no_scores = gl.full([ROWS, COLUMNS], 0.0, gl.float32, score_layout)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    running_sum = gl.full([ROWS], 0.0, gl.float32, row_layout)
    acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, out_layout)
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, score_layout))

    mbarrier.wait(q_full.index(HALF), 0)
    mbarrier.wait(k_full.index(0), 0)
    k_tile = k_shared.index(0).reshape([COLUMNS, HEAD_DIM]).permute([1, 0])
    scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_free.index(0), count=1)
    scores = gl.where((last_start + columns < kv_len)[None, :], scores, float("-inf"))
    probs, rescale, running_max, running_sum = softmax(scores, scale_log2, running_max, running_sum)
    weights = gl.convert_layout(probs.to(dtype), probs_layout)

    for tile in range(0, last):
        slot, other = tile % STAGES, (tile + 1) % STAGES
        scores_token, acc_token = start_products(
            tile, q_tile, weights, acc, no_scores, k_shared, v_shared, k_full, v_full
        )
        scores = warpgroup_mma_wait(1, deps=(scores_token,))
        mbarrier.arrive(k_free.index(other), count=1)
        probs, rescale, running_max, running_sum = softmax(
            scores, scale_log2, running_max, running_sum
        )
        # It has flipped already. ptxas moves the wait for products up to the last wait for a
        # barrier: without this one the exponentials would begin when P V has ended.
        mbarrier.wait(v_full.index(slot), tile // STAGES & 1)
        acc = warpgroup_mma_wait(0, deps=(acc_token,))
        mbarrier.arrive(v_free.index(slot), count=1)
        acc = acc * gl.convert_layout(rescale, out_row_layout)[:, None]
        weights = gl.convert_layout(probs.to(dtype), probs_layout)

    mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
    v_tile = v_shared.index(last % STAGES).reshape([COLUMNS, HEAD_DIM])
    acc_token = warpgroup_mma(weights, v_tile, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc_token,))

    lse, scale = lse_and_scale(running_max, running_sum, kept, ln_2)
    acc = gl.where(kept == 0, 0.0, acc)  # an empty row has read a block that may hold NaN
    acc = acc * gl.convert_layout(scale, out_row_layout)[:, None]

    rows = q_start + HALF * ROWS + gl.arange(0, ROWS, row_layout)
    gl.store(lse_row + rows, lse, mask=rows < q_len)
    q_tile.store(acc.to(dtype))  # nobody reads these queries any more
    fence_async_shared()
    store_tile(out, [batch, head, q_start + HALF * ROWS, 0], q_shared.index(HALF))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "q_len", "kv_len"])
def hopper_specialized_fwd_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    kv_num_blocks_ptr,
    kv_indices_ptr,
    order_ptr,
    num_blocks_strides,
    indices_strides,
    heads,
    q_len,
    kv_len,
    scale_log2,
    ln_2,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q.dtype
    q_blocks = (q_len + 127) // 128
    row = gl.program_id(0)
    if order_ptr is not None:
        row = gl.load(order_ptr + row)
    q_block, head, batch, kept, indices_row = list_of_row(
        row, q_blocks, heads, kv_num_blocks_ptr, kv_indices_ptr, num_blocks_strides, indices_strides
    )
    q_start = q_block * 128
    last_start = read_index(indices_row, indices_strides[3], 0, kept, gl.maximum(kept, 1))
    lse_row = lse_ptr + (batch.to(gl.int64) * heads + head) * q_len

    q_shared = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, HEAD_DIM], q.layout)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, HEAD_DIM], k.layout)
    v_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, HEAD_DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()

    buffers = (q_shared, k_shared, v_shared)
    barriers = (q_full, k_full, k_free, v_full, v_free)
    place = (batch, head, q_start)
    numbers = (last_start, kept, q_len, kv_len, scale_log2, ln_2)
    listed = (indices_row, indices_strides[3], kept)
    gl.warp_specialize(
        [
            (consume, (0, out, lse_row, buffers, barriers, place, numbers, STAGES)),
            (consume, (1, out, lse_row, buffers, barriers, place, numbers, STAGES)),
            (produce, (q, k, v, buffers, barriers, place, listed, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def hopper_specialized_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    order: Tensor | None,
    tile: Tile,
) -> None:
    """Fill `out` and `lse`. Arguments as checked and prepared by `block_sparse_fwd`."""
    batch, q_len, heads, _ = query.shape
    hopper_specialized_fwd_kernel[(-(-q_len // BLOCK) * heads * batch,)](
        q=describe(query, ROWS),
        k=describe(key, BLOCK),
        v=describe(value, BLOCK),
        out=describe(out, ROWS),
        **list_arguments(query, key, kv_num_blocks, kv_indices, lse, order, scale),
        STAGES=tile.num_stages,
        PRODUCER_REGISTERS=24,
        CONSUMER_REGISTERS=240,  # of the second; the first has the rest
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )
