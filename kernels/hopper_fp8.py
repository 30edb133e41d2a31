"""The forward of block_sparse_fwd in FP8 for Hopper in Gluon: both products in e4m3.

As in hopper_fwd, P V of a tile runs beside the exponentials of the next. A program has 64 queries,
a tile is one whole kv block; the sum of a tile is made by the tensor cores, which keep few bits of
it, and added to those before in float32. What 8 bits would cost beside that is avoided:

- A weight is the probability times its block's scale of values, in 256ths of the largest such
  product of the row: all of it is in the exponent, so that neither scales nor e4m3's range take a
  multiplication a score, and only blocks that a row reads decide what its weights resolve.
- Where a product leaves its sums, a thread has 2 neighbours of each 8 in a row; where the next one
  reads its weights, 4 of each 16. So values come with the tokens of each 16 in another order
  (`quantize_values`), and no weight has to move.

Limits: Hopper; head dim 64 or 128; blocks of 64 or 128; no kv_len.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_fwd import (
    describe,
    list_arguments,
    list_of_row,
    load,
    lse_and_scale,
    shared_layout,
    store_rows,
)
from .tiles import Tile

ROWS = 64  # of a program
# At head dim 64, by columns, for four or three programs a multiprocessor; at head dim 128 there are
# two without a limit.
MAX_REGISTERS = {64: 128, 128: 168}


@gluon.jit
def softmax_to_8_bits(scores, scales, seen, scale_log2, running_max, running_sum):
    # Weights in float32 as e4m3 will hold them, up to 256; `scales` of their block: of its keys,
    # log2 of that of its values, its inverse. The maximum is of logits with the scale of values.
    k_scale, log2_v_scale, inverse = scales
    if seen is not None:
        scores = gl.where(seen[None, :], scores, float("-inf"))
    scale_log2 *= k_scale
    new_max = gl.maximum(running_max, gl.fma(gl.max(scores, 1), scale_log2, log2_v_scale))
    rescale = gl.exp2(running_max - new_max)
    weights = gl.exp2(gl.fma(scores, scale_log2, (log2_v_scale + 8.0 - new_max)[:, None]))
    running_sum = gl.fma(running_sum, rescale, gl.sum(weights, 1) * (inverse * (1 / 256)))
    return weights, rescale, new_max, running_sum


@gluon.jit
def to_operand(weights, layout: gl.constexpr):
    # In e4m3, tokens in the order of quantize_values, as the registers of a product hold them.
    ROWS: gl.constexpr = weights.shape[0]
    COLUMNS: gl.constexpr = weights.shape[1]
    weights = weights.reshape([ROWS, COLUMNS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    weights = weights.reshape([ROWS, COLUMNS]).to(gl.float8e4nv)
    return gl.convert_layout(weights, layout, assert_trivial=True)


@gluon.jit
def read_scales(scales_rows, block):
    of_keys, of_values = scales_rows
    log2_scale, inverse = gl.load(of_values + block * 2), gl.load(of_values + block * 2 + 1)
    return gl.load(of_keys + block), log2_scale, inverse


@gluon.jit
def advance(
    tile, state, q_tile, k, v, shared, ready, listed, scales_rows, seen, scale_log2,
    layout: gl.constexpr,
):  # fmt: skip
    # P V of this tile beside the exponentials of the next; `seen` are its columns, None is all.
    acc, of_tile, weights, rescale, running_max, running_sum, scales, block_2 = state
    k_shared, v_shared = shared
    k_ready, v_ready = ready
    batch, head, indices_row, index_stride, last = listed
    STAGES: gl.constexpr = k_shared.shape[0]
    COLUMNS: gl.constexpr = k_shared.shape[3]
    HEAD_DIM: gl.constexpr = k_shared.shape[4]
    # block_2 belongs to tile + 2, block_3 to tile + 3, `scales` to tile + 1
    block_3 = gl.load(indices_row + gl.minimum(tile + 3, last) * index_stride).to(gl.int32)
    next_scales = read_scales(scales_rows, block_2)
    slot, other = tile % STAGES, (tile + 1) % STAGES
    operand = to_operand(weights, layout)

    mbarrier.wait(k_ready.index(other), (tile + 1) // STAGES & 1)
    k_tile = k_shared.index(other).reshape([COLUMNS, HEAD_DIM]).permute([1, 0])
    # The weights are rounded: their registers take the next scores.
    scores = warpgroup_mma(q_tile, k_tile, weights, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(slot), tile // STAGES & 1)
    v_tile = v_shared.index(slot).reshape([HEAD_DIM, COLUMNS]).permute([1, 0])
    of_tile = warpgroup_mma(operand, v_tile, of_tile, use_acc=False, is_async=True)

    scores = warpgroup_mma_wait(1, deps=(scores,))
    load(k, batch, head, block_3 * COLUMNS, k_shared, k_ready, other, tile + 3 <= last)
    weights, next_rescale, running_max, running_sum = softmax_to_8_bits(
        scores, scales, seen, scale_log2, running_max, running_sum
    )
    of_tile = warpgroup_mma_wait(0, deps=(of_tile,))
    load(v, batch, head, block_2 * HEAD_DIM, v_shared, v_ready, slot, tile + 2 <= last)
    rescale = gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))
    acc = gl.fma(acc, rescale[:, None], of_tile)
    return acc, of_tile, weights, next_rescale, running_max, running_sum, next_scales, block_3


@gluon.jit(do_not_specialize=["heads", "q_len", "kv_len"])
def hopper_fp8_kernel(
    q,
    k,
    v,
    out_ptr,
    lse_ptr,
    kv_num_blocks_ptr,
    kv_indices_ptr,
    order_ptr,
    q_scales_ptr,
    k_scales_ptr,
    v_scales_ptr,
    shift_ptr,
    out_strides,
    num_blocks_strides,
    indices_strides,
    heads,
    q_len,
    kv_len,
    scale_log2,
    softmax_scale,
    ln_2,
    HEAD_DIM: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
):
    ROWS: gl.constexpr = 64
    SPLIT: gl.constexpr = BLOCK_Q // ROWS
    STAGES: gl.constexpr = 2
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 32]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 32]
    )
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 4)
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
    head_row = batch.to(gl.int64) * heads + head
    scale_log2 *= gl.load(q_scales_ptr + head_row * q_blocks + q_block)
    first_scale = head_row * ((kv_len + COLUMNS - 1) // COLUMNS)
    scales_rows = (k_scales_ptr + first_scale, v_scales_ptr + first_scale * 2)
    tiles = gl.maximum(kept, 1)  # an empty row works on a tile in vain

    q_shared = gl.allocate_shared_memory(q.dtype, [1, 1, 1, ROWS, HEAD_DIM], q.layout)
    k_shared = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, COLUMNS, HEAD_DIM], k.layout)
    v_shared = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, HEAD_DIM, COLUMNS], v.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
    fence_async_shared()

    # Blocks of the tiles ahead, each read long before its load.
    last, stride = tiles - 1, indices_strides[3]
    block_0 = gl.load(indices_row, mask=kept > 0, other=0).to(gl.int32)
    block_1 = gl.load(indices_row + stride, mask=kept > 1, other=0).to(gl.int32)
    block_2 = gl.load(indices_row + 2 * stride, mask=kept > 2, other=0).to(gl.int32)
    last_block = gl.load(indices_row + last * stride, mask=kept > 0, other=0).to(gl.int32)
    load(q, batch, head, q_start, q_shared, q_ready, 0, True)
    load(k, batch, head, block_0 * COLUMNS, k_shared, k_ready, 0, True)
    load(v, batch, head, block_0 * HEAD_DIM, v_shared, v_ready, 0, True)
    load(k, batch, head, block_1 * COLUMNS, k_shared, k_ready, 1, tiles > 1)
    load(v, batch, head, block_1 * HEAD_DIM, v_shared, v_ready, 1, tiles > 1)
    scales, next_scales = read_scales(scales_rows, block_0), read_scales(scales_rows, block_1)

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
    load(k, batch, head, block_2 * COLUMNS, k_shared, k_ready, 0, tiles > 2)
    seen = block_0 * COLUMNS + columns < kv_len
    weights, rescale, running_max, running_sum = softmax_to_8_bits(
        scores, scales, seen, scale_log2, running_max, running_sum
    )

    shared, ready = (k_shared, v_shared), (k_ready, v_ready)
    listed = (batch, head, indices_row, stride, last)
    state = (acc, acc, weights, rescale, running_max, running_sum, next_scales, block_2)
    for tile in range(0, last - 1):
        state = advance(
            tile, state, q_tile, k, v, shared, ready, listed, scales_rows, None, scale_log2,
            operand_layout,
        )  # fmt: skip
    # The last tile, the only one that the end of the keys can cut.
    for tile in range(gl.maximum(last - 1, 0), last):
        seen = last_block * COLUMNS + columns < kv_len
        state = advance(
            tile, state, q_tile, k, v, shared, ready, listed, scales_rows, seen, scale_log2,
            operand_layout,
        )  # fmt: skip
    acc, of_tile, weights, rescale, running_max, running_sum, scales, block_2 = state

    mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
    v_tile = v_shared.index(last % STAGES).reshape([HEAD_DIM, COLUMNS]).permute([1, 0])
    operand = to_operand(weights, operand_layout)
    of_tile = warpgroup_mma(operand, v_tile, of_tile, use_acc=False, is_async=True)
    of_tile = warpgroup_mma_wait(0, deps=(of_tile,))
    acc = gl.fma(acc, gl.convert_layout(rescale, out_row_layout)[:, None], of_tile)

    lse, scale = lse_and_scale(running_max, running_sum, kept, ln_2)
    acc = gl.where(kept == 0, 0.0, acc)  # an empty row has read a block that may hold NaN
    out = acc * gl.convert_layout(scale * (1 / 256), out_row_layout)[:, None]

    rows = q_start + gl.arange(0, ROWS, row_layout)
    head_rows = head_row * q_len + rows
    lse += gl.load(shift_ptr + head_rows, mask=rows < q_len, other=0.0) * softmax_scale
    gl.store(lse_ptr + head_rows, lse, mask=rows < q_len)
    out = out.to(out_ptr.dtype.element_ty)
    store_rows(out_ptr, out_strides, batch, head, q_start, q_len, out, 4)


def describe_values(values: Tensor) -> TensorDescriptor:
    """A descriptor of values `(B, H, N, D, block)` that loads one block."""
    batch, heads, blocks, head_dim, block = values.shape
    shape, tile = [batch, heads, blocks * head_dim, block], [1, 1, head_dim, block]
    strides = [shape[1] * shape[2] * block, shape[2] * block, block, 1]
    layout = shared_layout(head_dim, block, values.dtype)
    return TensorDescriptor(values, shape, strides, tile, layout)


def hopper_fp8(
    query: Tensor,
    key: Tensor,
    values: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    q_scales: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    shift: Tensor,
    block_size: tuple[int, int],
    scale: float,
    order: Tensor | None,
    tile: Tile,
) -> None:
    """Fill `out` and `lse`.

    Args:
        query, key, q_scales, k_scales, shift: as `quantize` gives them.
        values, v_scales: as `quantize_values` gives them block by block.

    The others as checked and prepared by `block_sparse_fwd`.

    Raises:
        ValueError: a tile that this kernel does not have.
    """
    wanted = Tile(ROWS, values.shape[4], 4, 2, True)
    if tile != wanted:
        raise ValueError(f"FP8 in Gluon has {wanted} for these blocks, got {tile}")
    batch, q_len, heads, head_dim = query.shape
    hopper_fp8_kernel[(-(-q_len // block_size[0]) * (block_size[0] // ROWS) * heads * batch,)](
        q=describe(query, ROWS),
        k=describe(key, tile.columns),
        v=describe_values(values),
        out_ptr=out,
        q_scales_ptr=q_scales,
        k_scales_ptr=k_scales,
        v_scales_ptr=v_scales,
        shift_ptr=shift,
        out_strides=out.stride(),
        softmax_scale=scale,
        **list_arguments(query, key, kv_num_blocks, kv_indices, lse, order, scale),
        COLUMNS=tile.columns,
        BLOCK_Q=block_size[0],
        num_warps=4,
        maxnreg=MAX_REGISTERS[tile.columns] if head_dim == 64 else None,
    )
