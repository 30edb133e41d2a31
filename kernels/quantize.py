"""Queries, keys and values in 8 bits with one scale a block, keys less their mean.

    q8[i] = round(q[i] / q_scale),  k8[j] = round((k[j] - mean) / k_scale),  shift[i] = q[i] . mean

A scale is the block's largest magnitude over the largest number of the format: 127 in INT8, 448 in
FP8 (e4m3). Taking one vector off all keys of a head adds the same to every logit of a query, so the
softmax is what it was and the log-sum-exp lacks scale * shift; what is left of the keys is smaller,
and so is its rounding (SageAttention, arXiv 2410.02367). Any vector would do: the mean of block
means is taken, which one more kernel gives.

INT8 has finer steps, and every GPU from compute capability 8.0 multiplies it; but its sums must be
made floats, at the rate of exponentials. FP8 needs 8.9. Values are in 8 bits in FP8 alone, their
tokens last: tensor cores read the second factor of an 8-bit product along what is summed over.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_pool import block_pool
from .dot import check_tensors, load_tile, padded_head_dim, to_fp8

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@triton.jit
def to_8_bits(tile, dtype: tl.constexpr):
    # The tile in 8 bits, and what it must be multiplied by.
    limit: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    largest = tl.maximum(tl.max(tl.max(tl.abs(tile), 1), 0), 1e-20)
    scaled = tile * (limit / largest)
    if dtype == tl.int8:
        rounded = tl.floor(scaled + 0.5).to(tl.int8)
    else:
        rounded = to_fp8(scaled)
    return rounded, largest / limit


@triton.jit(do_not_specialize=["seqlen"])
def quantize_kernel(
    x,
    mean_ptr,
    out_ptr,
    scale_ptr,
    shift_ptr,
    kv_len_ptr,
    strides,
    seqlen,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, heads = block * BLOCK, tl.num_programs(1)
    tile = load_tile(
        x, strides, batch, head, start, seqlen, HEAD_DIM, BLOCK_D, BLOCK, False, True
    ).to(tl.float32)
    rows = start + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    row_of_head = batch.to(tl.int64) * heads + head
    mean = tl.load(mean_ptr + row_of_head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    if shift_ptr is not None:  # queries
        shift = tl.sum(tile * mean[None, :], 1)
        tl.store(shift_ptr + row_of_head * seqlen + rows, shift, mask=rows < seqlen)
    else:
        valid = seqlen
        if kv_len_ptr is not None:
            valid = tl.minimum(tl.load(kv_len_ptr + batch), seqlen)
        # Padding may hold NaN, and is not what sets the scale.
        tile = tl.where((rows < valid)[:, None], tile - mean[None, :], 0.0)
    rounded, scale = to_8_bits(tile, out_ptr.dtype.element_ty)
    tl.store(scale_ptr + row_of_head * tl.num_programs(0) + block, scale)
    out_rows = (batch.to(tl.int64) * seqlen + rows)[:, None] * heads + head
    valid_out = (rows < seqlen)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptr + out_rows * HEAD_DIM + dims[None, :], rounded, mask=valid_out)


@triton.jit(do_not_specialize=["seqlen"])
def quantize_values_kernel(
    x,
    out_ptr,
    scale_ptr,
    kv_len_ptr,
    strides,
    seqlen,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_BLOCK: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, heads = tl.num_programs(0), tl.num_programs(1)
    start = block * BLOCK
    tile = load_tile(
        x, strides, batch, head, start, seqlen, HEAD_DIM, BLOCK_D, BLOCK, False, True
    ).to(tl.float32)
    rows = start + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    valid = seqlen
    if kv_len_ptr is not None:
        valid = tl.minimum(tl.load(kv_len_ptr + batch), seqlen)
    tile = tl.where((rows < valid)[:, None], tile, 0.0)  # padding may hold NaN
    rounded, scale = to_8_bits(tile, out_ptr.dtype.element_ty)
    row_of_head = batch.to(tl.int64) * heads + head
    scale_ptr += (row_of_head * blocks + block) * (2 if BY_BLOCK else 1)
    if BY_BLOCK:
        tl.store(scale_ptr, tl.log2(scale))
        tl.store(scale_ptr + 1, 1.0 / scale)
        # As store order: tokens 0, 1, 8, 9 of each 16, then 2, 3, 10, 11, and so on.
        values = rounded.trans().reshape(BLOCK_D, BLOCK // 16, 2, 4, 2).permute(0, 1, 3, 2, 4)
        values = values.reshape(BLOCK_D, BLOCK)
        out_rows = ((row_of_head * blocks + block) * HEAD_DIM + dims)[:, None] * BLOCK
        columns = tl.arange(0, BLOCK)
    else:
        tl.store(scale_ptr, scale)
        values, columns = rounded.trans(), rows
        out_rows = (row_of_head * HEAD_DIM + dims)[:, None] * (blocks * BLOCK)
    tl.store(out_ptr + out_rows + columns[None, :], values, mask=(dims < HEAD_DIM)[:, None])


def quantize_values(
    value: Tensor, block: int, kv_len: Tensor | None = None, by_block: bool = False
) -> tuple[Tensor, Tensor]:
    """Values `(B, S, H, D)` in FP8, tokens last.

    Returns:
        `(B, H, D, N * block)`, zeros after the last valid token, and scales `(B, H, N)` float32.
        With `by_block` values are `(B, H, N, D, block)`, the tokens of each 16 in the order 0, 1,
        8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15 (`hopper_fp8.py` says why), and scales are
        `(B, H, N, 2)`: log2 of each and its inverse.
    """
    value = value if value.stride(3) == 1 else value.contiguous()
    batch, seqlen, heads, head_dim = value.shape
    blocks = triton.cdiv(seqlen, block)
    shape, device = (batch, heads, head_dim, blocks * block), value.device
    if by_block:
        shape = batch, heads, blocks, head_dim, block
    out = torch.empty(shape, dtype=DTYPES["fp8"], device=device)
    of_block = (2,) if by_block else ()
    scale = torch.empty((batch, heads, blocks, *of_block), dtype=torch.float32, device=device)
    with torch.cuda.device_of(value):
        quantize_values_kernel[(blocks, heads, batch)](
            x=value,
            out_ptr=out,
            scale_ptr=scale,
            kv_len_ptr=kv_len,
            strides=value.stride(),
            seqlen=seqlen,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK=block,
            BY_BLOCK=by_block,
            num_warps=4,
        )
    return out, scale


def quantize(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    kv_len: Tensor | None = None,
    precision: str = "int8",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys in 8 bits.

    Args:
        query, key: `(B, S, H, D)` and `(B, S_kv, H, D)`, any strides.
        block_size: tokens in a query block and in a key block.
        kv_len: `(B,)` int32, valid keys per sample; all by default.
        precision: "int8" or "fp8".

    Returns:
        Both in 8 bits in their shapes, their scales `(B, H, N)` and `(B, H, Nkv)` float32, and the
        shift `(B, H, S)` float32.
    """
    check_tensors(query=query, key=key)
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    mean = block_pool(key, block_size[1], kv_len)
    if kv_len is None:
        mean = mean.mean(2)  # (B, H, D)
    else:  # blocks without a valid key are 0
        blocks = (kv_len + block_size[1] - 1) // block_size[1]
        mean = mean.sum(2) / blocks.clamp(1, mean.shape[2])[:, None, None]
    batch, q_len, heads, head_dim = query.shape
    shift = torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    results = []
    for x, block, of_query in ((query, block_size[0], True), (key, block_size[1], False)):
        blocks = triton.cdiv(x.shape[1], block)
        out = torch.empty(x.shape, dtype=DTYPES[precision], device=x.device)
        scale = torch.empty((batch, heads, blocks), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            quantize_kernel[(blocks, heads, batch)](
                x=x,
                mean_ptr=mean,
                out_ptr=out,
                scale_ptr=scale,
                shift_ptr=shift if of_query else None,
                kv_len_ptr=None if of_query else kv_len,
                strides=x.stride(),
                seqlen=x.shape[1],
                HEAD_DIM=head_dim,
                BLOCK_D=padded_head_dim(head_dim),
                BLOCK=block,
                num_warps=4,
            )
        results += [out, scale]
    query8, q_scale, key8, k_scale = results
    return query8, key8, q_scale, k_scale, shift
