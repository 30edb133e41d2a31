"""Queries and keys in INT8 with one scale a block, keys less their mean: one Triton kernel each.

    q8[i] = round(q[i] / q_scale),  k8[j] = round((k[j] - mean) / k_scale),  shift[i] = q[i] . mean

A scale is the block's largest magnitude over 127. Taking one vector off all keys of a head adds the
same to every logit of a query, so the softmax is what it was and the log-sum-exp lacks scale *
shift; what is left of the keys is smaller, and so is its rounding (SageAttention, arXiv
2410.02367). Any vector would do: the mean of block means is taken, which one more kernel gives.

Why INT8 and not FP8: every GPU from compute capability 8.0 multiplies it, FP8 needs 8.9, and with a
scale a block its steps are finer than those of FP8's three bits. Values stay in 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_pool import block_pool
from .dot import check_tensors, load_tile, padded_head_dim


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
    largest = tl.maximum(tl.max(tl.max(tl.abs(tile), 1), 0), 1e-20)
    rounded = tl.floor(tile * (127.0 / largest) + 0.5).to(tl.int8)
    tl.store(scale_ptr + row_of_head * tl.num_programs(0) + block, largest / 127.0)
    out_rows = (batch.to(tl.int64) * seqlen + rows)[:, None] * heads + head
    valid_out = (rows < seqlen)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_ptr + out_rows * HEAD_DIM + dims[None, :], rounded, mask=valid_out)


def quantize(
    query: Tensor, key: Tensor, block_size: tuple[int, int], kv_len: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys in INT8.

    Args:
        query, key: `(B, S, H, D)` and `(B, S_kv, H, D)`, any strides.
        block_size: tokens in a query block and in a key block.
        kv_len: `(B,)` int32, valid keys per sample; all by default.

    Returns:
        Both as int8 in their shapes, their scales `(B, H, N)` and `(B, H, Nkv)` float32, and the
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
        out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
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
