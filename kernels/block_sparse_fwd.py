"""Attention forward over the kv blocks that each q block lists, one Triton kernel.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   j in the kept kv blocks of i's q block
    lse[i] = log sum_j exp(scale * q[i] . k[j])

Launch grid: q tiles of all heads and samples, in `order` if given, else heads one after another.
A program keeps one q tile, walks its list of kv blocks with an online softmax and masks only the
one kv tile that is cut by the sequence's end. A tile may be smaller than a logical block: a listed
block of 128 keys runs as two tiles of 64.

The GPU starts programs in the order of the grid and a new one wherever one ends. With the longest
rows first that is balanced scheduling without a queue of our own, and since heads stay together
their keys and values stay in the L2 cache.

Limits: forward only; head dim up to 256; q blocks and kv blocks of 32, 64 or 128 tokens. Indices
are trusted: reading them back to check would stall the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .dot import (
    LN_2,
    LOG2_E,
    check_block_size,
    check_index,
    check_scale,
    check_tensors,
    describe,
    dot,
    load_path,
    load_tile,
    online_softmax,
    padded_head_dim,
    to_fp8,
)
from .quantize import DTYPES, quantize, quantize_values
from .tiles import FORWARD, FORWARD_FP8, Tile, gluon_runs, launch, tile_for
from .tuned import problem, tuned_tile

# Probabilities in FP8 use its whole range up to 448.
PROBS_SCALE: tl.constexpr = tl.constexpr(256.0)


@triton.jit
def load_values_8_bits(
    v,
    strides,
    batch,
    head,
    start,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    # Tokens start .. start + COLUMNS of one head, (BLOCK_D, COLUMNS).
    if DESCRIPTORS:
        return v.load([batch, head, 0, start]).reshape(BLOCK_D, COLUMNS)
    else:
        dims = tl.arange(0, BLOCK_D)
        base = v + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + start
        pointers = base + (dims.to(tl.int64)[:, None] * strides[2] + tl.arange(0, COLUMNS)[None, :])
        return tl.load(pointers, mask=(dims < HEAD_DIM)[:, None], other=0.0)


@triton.jit
def attend_tile(
    q,
    k,
    v,
    k_strides,
    v_strides,
    batch,
    head,
    start,
    kv_len,
    scale_log2,
    k_scales,
    v_scales,
    running_max,
    running_sum,
    acc,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    if k_scales is not None:  # 8 bits: one scale a block
        scale_log2 *= tl.load(k_scales + start // BLOCK_KV)
    k_tile = load_tile(
        k, k_strides, batch, head, start, kv_len, HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, MASKED
    )
    # (ROWS, BLOCK_D) @ (BLOCK_D, COLUMNS) -> (ROWS, COLUMNS), exact in int32 where both are INT8
    scores = dot(q, k_tile.trans()).to(tl.float32)
    if MASKED:
        kv_valid = start + tl.arange(0, COLUMNS) < kv_len
        # Dead keys must not win the maximum.
        scores = tl.where(kv_valid[None, :], scores, float("-inf"))
    probs, rescale, running_max, running_sum = online_softmax(
        scores, scale_log2, running_max, running_sum
    )
    # (ROWS, COLUMNS) @ (COLUMNS, BLOCK_D) -> (ROWS, BLOCK_D)
    if v_scales is not None:
        v_tile = load_values_8_bits(
            v, v_strides, batch, head, start, HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS
        )
        # Tensor cores add up FP8 products in few bits: only a tile's, the rest in float32.
        of_tile = dot(to_fp8(probs * PROBS_SCALE), v_tile.trans())
        v_scale = tl.load(v_scales + start // BLOCK_KV) / PROBS_SCALE
        acc = acc * rescale[:, None] + of_tile * v_scale
    else:
        v_tile = load_tile(
            v,
            v_strides,
            batch,
            head,
            start,
            kv_len,
            HEAD_DIM,
            BLOCK_D,
            COLUMNS,
            DESCRIPTORS,
            MASKED,
        )
        if MASKED:
            # Padding may hold NaN, and 0 * NaN is NaN.
            v_tile = tl.where(kv_valid[:, None], v_tile, 0.0)
        acc = dot(probs.to(v_tile.dtype), v_tile, acc * rescale[:, None])
    return running_max, running_sum, acc


@triton.jit(do_not_specialize=["heads", "q_len", "max_kv_len"])
def block_sparse_fwd_kernel(
    q,
    k,
    v,
    out_ptr,
    lse_ptr,
    kv_num_blocks_ptr,
    kv_indices_ptr,
    kv_len_ptr,
    order_ptr,
    q_scales_ptr,
    k_scales_ptr,
    v_scales_ptr,
    shift_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    num_blocks_strides,
    indices_strides,
    heads,
    q_len,
    max_kv_len,
    scale_log2,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    SPLIT: tl.constexpr = BLOCK_Q // ROWS
    q_blocks = tl.cdiv(q_len, BLOCK_Q)
    row = tl.program_id(0) // SPLIT  # a q block of one head and sample
    if order_ptr is not None:
        row = tl.load(order_ptr + row)
    q_block, head, batch = row % q_blocks, row // q_blocks % heads, row // q_blocks // heads
    q_start = q_block * BLOCK_Q + tl.program_id(0) % SPLIT * ROWS
    if q_start >= q_len:  # the last q block is short
        return
    TILES_PER_BLOCK: tl.constexpr = BLOCK_KV // COLUMNS

    kv_len = max_kv_len
    if kv_len_ptr is not None:
        kv_len = tl.minimum(tl.load(kv_len_ptr + batch), max_kv_len)

    num_blocks = tl.load(
        kv_num_blocks_ptr
        + batch.to(tl.int64) * num_blocks_strides[0]
        + head.to(tl.int64) * num_blocks_strides[1]
        + q_block.to(tl.int64) * num_blocks_strides[2]
    )
    indices_row = (
        kv_indices_ptr
        + batch.to(tl.int64) * indices_strides[0]
        + head.to(tl.int64) * indices_strides[1]
        + q_block.to(tl.int64) * indices_strides[2]
    )

    # Ascending indices: blocks without a valid key, and the one cut by kv_len, end the list.
    last_start = tl.full((), 0, tl.int32)
    dropping = num_blocks > 0
    while dropping:
        last_index = tl.load(indices_row + (num_blocks - 1) * indices_strides[3])
        last_start = last_index.to(tl.int32) * BLOCK_KV
        dropping = last_start >= kv_len
        if dropping:
            num_blocks -= 1
            dropping = num_blocks > 0
    last_len = tl.minimum(kv_len - last_start, BLOCK_KV)
    full_tiles = (num_blocks - 1) * TILES_PER_BLOCK + last_len // COLUMNS
    full_tiles = tl.where(num_blocks > 0, full_tiles, 0)

    head_row = batch.to(tl.int64) * heads + head
    k_scales, v_scales = k_scales_ptr, v_scales_ptr
    if q_scales_ptr is not None:
        scale_log2 *= tl.load(q_scales_ptr + head_row * q_blocks + q_block)
        k_scales += head_row * tl.cdiv(max_kv_len, BLOCK_KV)
    if v_scales_ptr is not None:
        v_scales += head_row * tl.cdiv(max_kv_len, BLOCK_KV)
    q_tile = load_tile(
        q, q_strides, batch, head, q_start, q_len, HEAD_DIM, BLOCK_D, ROWS, DESCRIPTORS, True
    )
    running_max = tl.full((ROWS,), float("-inf"), tl.float32)
    running_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)

    start = tl.load(indices_row, mask=full_tiles > 0, other=0).to(tl.int32) * BLOCK_KV
    for tile in tl.range(0, full_tiles):
        # The next index is read now, so that no load of keys waits for one.
        after = tl.minimum(tile + 1, full_tiles - 1)
        next_index = tl.load(indices_row + (after // TILES_PER_BLOCK) * indices_strides[3])
        running_max, running_sum, acc = attend_tile(
            q_tile,
            k,
            v,
            k_strides,
            v_strides,
            batch,
            head,
            start,
            kv_len,
            scale_log2,
            k_scales,
            v_scales,
            running_max,
            running_sum,
            acc,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_KV,
            COLUMNS,
            DESCRIPTORS,
            MASKED=False,
        )
        start = next_index.to(tl.int32) * BLOCK_KV + (after % TILES_PER_BLOCK) * COLUMNS
    if (num_blocks > 0) & (last_len % COLUMNS > 0):
        running_max, running_sum, acc = attend_tile(
            q_tile,
            k,
            v,
            k_strides,
            v_strides,
            batch,
            head,
            last_start + last_len // COLUMNS * COLUMNS,
            kv_len,
            scale_log2,
            k_scales,
            v_scales,
            running_max,
            running_sum,
            acc,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_KV,
            COLUMNS,
            DESCRIPTORS,
            MASKED=True,
        )

    # A row without kv blocks has sum 0: output 0, LSE -inf.
    empty = running_sum == 0.0
    out = acc / tl.where(empty, 1.0, running_sum)[:, None]  # (ROWS, BLOCK_D)
    lse = (running_max + tl.log2(tl.where(empty, 1.0, running_sum))) * LN_2  # (ROWS,)

    rows = q_start + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    q_valid = rows < q_len
    out_base = out_ptr + batch.to(tl.int64) * out_strides[0] + head.to(tl.int64) * out_strides[2]
    tl.store(
        out_base + rows.to(tl.int64)[:, None] * out_strides[1] + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=q_valid[:, None] & (dims < HEAD_DIM)[None, :],
    )
    if shift_ptr is not None:  # what the keys lost with their mean
        shift = tl.load(shift_ptr + head_row * q_len + rows, mask=q_valid, other=0.0)
        lse += shift * softmax_scale
    tl.store(lse_ptr + head_row * q_len + rows, lse, mask=q_valid)


def check_precision(query: Tensor, precision: str) -> None:
    """Raise `ValueError` unless 8 bits were asked for and serve queries like these."""
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of full, {', '.join(DTYPES)}, got {precision!r}")
    if query.dtype == torch.float32 or query.shape[3] <= 16:
        raise ValueError(
            f"precision={precision!r} takes bfloat16 and float16 and head dims from 17, got"
            f" {query.dtype} and {query.shape[3]}. Use precision='full'."
        )


def describe_values_8_bits(v: Tensor, columns: int) -> TensorDescriptor:
    """A descriptor of `(B, H, D, S)` that loads `columns` tokens of one head."""
    block = [1, 1, padded_head_dim(v.shape[2]), columns]
    return TensorDescriptor(v, list(v.shape), list(v.stride()), block)


def default_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: tuple[int, int],
    triton_only: bool = False,
) -> Tile:
    """The tile of the table for tensors like these, of Triton's kernel alone if asked for."""
    path, head_dim = load_path(query, key, value), query.shape[-1]
    # What the Gluon kernels serve: head dims of 64 and 128.
    served = path == "descriptor" and not triton_only and head_dim in (64, 128)
    gluon = served and gluon_runs(query.device)
    found = tuned_tile(query.device, problem(path, head_dim, block_size))
    if found is not None and (gluon or not found.gluon) and query.element_size() > 1:
        return found
    table = FORWARD_FP8 if query.dtype == DTYPES["fp8"] else FORWARD
    return tile_for(table, query.device, path, padded_head_dim(head_dim), block_size, gluon)


def block_sparse_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    block_size: tuple[int, int],
    scale: float | None = None,
    kv_len: Tensor | None = None,
    order: Tensor | None = None,
    precision: str = "full",
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` over the listed kv blocks of `key` and `value`.

    Args:
        query: `(B, S, H, D)`, bfloat16, float16 or float32, any strides.
        key, value: `(B, S_kv, H, D)`.
        kv_num_blocks: `(B, H, Nq)` int32, how many kv blocks each q block reads. B and H may be
            1 to share one list. A row of 0 gives output 0 and LSE -inf.
        kv_indices: `(B, H, Nq, K)` int16 or int32, which ones, ascending.
        block_size: `(block_q, block_kv)` in tokens, each 32, 64 or 128.
        scale: softmax scale, 1 / sqrt(D) by default.
        kv_len: `(B,)` int32, valid keys per sample; all by default.
        order: `(B * H * Nq,)` int32, rows in the order in which they start, best the longest
            first. It changes the time only.
        precision: "int8" multiplies queries and keys in INT8, "fp8" queries, keys and values in FP8
            (`quantize.py`), of bfloat16 and float16 and head dims from 17; "full" in their dtype.
        tile: another tile than the table's, for measurements; where it fails, nothing replaces it.

    Returns:
        The output `(B, S, H, D)` in the query's dtype and the natural-log LSE `(B, H, S)` in
        float32.
    """
    check_tensors(query=query, key=key, value=value)
    check_block_size(block_size)
    if key.shape != value.shape:
        raise ValueError(
            f"value must have the shape of key {tuple(key.shape)}, got {tuple(value.shape)}. "
            "Cut both to the same tokens."
        )
    batch, q_len, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    check_scale(scale)
    block_q, block_kv = block_size
    q_blocks = -(-q_len // block_q)
    shape, device = (batch, heads, q_blocks), query.device
    check_index("kv_num_blocks", kv_num_blocks, shape, (torch.int32,), device)
    check_index("kv_indices", kv_indices, (*shape, None), (torch.int16, torch.int32), device)
    if kv_len is not None:
        check_index("kv_len", kv_len, (batch,), (torch.int32,), device)
        kv_len = kv_len.contiguous()
    if order is not None:
        check_index("order", order, (batch * heads * q_blocks,), (torch.int32,), device)
        order = order.contiguous()

    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    kv_num_blocks = kv_num_blocks.expand(shape)
    kv_indices = kv_indices.expand(*shape, -1)
    out = torch.empty(query.shape, dtype=value.dtype, device=device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device)

    q_scales = k_scales = shift = None
    if precision != "full":
        check_precision(query, precision)
        given = query, key, block_size, kv_len, precision
        query, key, q_scales, k_scales, shift = quantize(*given)
    fp8 = precision == "fp8"  # then values are in 8 bits, too, as the kernel wants them
    read = query, key, key if fp8 else value
    descriptors, dim = load_path(*read) == "descriptor", padded_head_dim(head_dim)
    describe_v = describe_values_8_bits if fp8 else describe

    def run(tile: Tile) -> None:
        v, v_scales = value, None
        if fp8:
            v, v_scales = quantize_values(value, block_kv, kv_len, by_block=tile.gluon)
        if tile.gluon and fp8:
            from .hopper_fp8 import hopper_fp8

            scales = {"q_scales": q_scales, "k_scales": k_scales, "v_scales": v_scales}
            given = query, key, v, kv_num_blocks, kv_indices, out, lse
            options = {"block_size": block_size, "scale": scale, "order": order, "tile": tile}
            return hopper_fp8(*given, **scales, shift=shift, **options)
        if tile.gluon:
            from .hopper_fwd import hopper_fwd
            from .hopper_specialized_fwd import hopper_specialized_fwd

            given = query, key, value, kv_num_blocks, kv_indices, out, lse
            if (tile.rows, tile.columns) == (128, 128):
                return hopper_specialized_fwd(*given, scale=scale, order=order, tile=tile)
            return hopper_fwd(*given, block_size=block_size, scale=scale, order=order, tile=tile)
        rows, columns = tile.rows, tile.columns
        block_sparse_fwd_kernel[(q_blocks * (block_q // rows) * heads * batch,)](
            q=describe(query, rows) if descriptors else query,
            k=describe(key, columns) if descriptors else key,
            v=describe_v(v, columns) if descriptors else v,
            out_ptr=out,
            lse_ptr=lse,
            kv_num_blocks_ptr=kv_num_blocks,
            kv_indices_ptr=kv_indices,
            kv_len_ptr=kv_len,
            order_ptr=order,
            q_scales_ptr=q_scales,
            k_scales_ptr=k_scales,
            v_scales_ptr=v_scales,
            shift_ptr=shift,
            q_strides=query.stride(),
            k_strides=key.stride(),
            v_strides=v.stride(),
            out_strides=out.stride(),
            num_blocks_strides=kv_num_blocks.stride(),
            indices_strides=kv_indices.stride(),
            heads=heads,
            q_len=q_len,
            max_kv_len=key.shape[1],
            scale_log2=scale * LOG2_E,
            softmax_scale=scale,
            HEAD_DIM=head_dim,
            BLOCK_D=dim,
            BLOCK_Q=block_q,
            BLOCK_KV=block_kv,
            ROWS=rows,
            COLUMNS=columns,
            DESCRIPTORS=descriptors,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    key_of = ("block_sparse_fwd", device, query.dtype, dim, block_size)
    with torch.cuda.device_of(query):
        if tile is None:
            # The Gluon kernels know neither valid lengths nor INT8.
            own = kv_len is not None or precision == "int8"
            tile = default_tile(*read, block_size, own)
            instead = default_tile(*read, block_size, True).within(block_size) if fp8 else None
            launch(key_of, tile.within(block_size), run, instead)
        else:
            run(tile.within(block_size))
    return out, lse
