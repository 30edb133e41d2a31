"""The tail of block-sparse attention: blocks that a mask leaves out, told by means of their tokens.

    logit[i, m] = scale * q[i] . pooled_key[m] + log(tokens in m),   m's block not kept by i's

and the softmax over m weighs pooled values. A program may start from what the sparse part came to
(its output and LSE are one state of the online softmax), so that both parts share one softmax and
nothing is merged afterwards.

Launch grid: (q tiles, heads, batch). A program keeps one q tile, reads its row of mask bits and
walks all pooled keys: 1 / tail_tokens of a dense call. Limits are those of `block_sparse_fwd`.

Products are few, so instructions beside them decide: inside, logits count from that of a mean of
`tail_tokens` tokens, so that log(tokens) is added for the last means alone, and the bits of a whole
tile of means come in one or two words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
)
from .tiles import TAIL, Tile, launch, tile_for

# A maximum to start from that is below every logit, and finite: a tile without dropped blocks then
# adds exp2(-inf - LOWEST) = 0, where -inf would make it NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def from_fp8(bits):
    """float32 of float8_e4m3fn bits, by hand: older GPUs cannot convert it.

    Sign and magnitude go to their places in a float32, whose exponent is then 120 too small.
    """
    word = bits.to(tl.int32)
    magnitude = ((word & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(word < 128, magnitude, -magnitude)


@triton.jit
def kept_of_tile(
    bits_row, start, COLUMNS: tl.constexpr, TAIL_TOKENS: tl.constexpr, BLOCK_KV: tl.constexpr
):
    # The lowest bit of each entry: is the block of mean start + i kept? COLUMNS divides `start`.
    BLOCKS: tl.constexpr = COLUMNS * TAIL_TOKENS // BLOCK_KV  # at most 64; 0 is a part of one
    blocks = tl.arange(0, COLUMNS) // (BLOCK_KV // TAIL_TOKENS)
    first = start // (BLOCK_KV // TAIL_TOKENS)
    bytes_ptr = bits_row + first // 8
    low = tl.load(bytes_ptr).to(tl.int32)
    if BLOCKS < 8:
        return (low >> (first % 8 + blocks)) & 1
    for byte in tl.static_range(1, min(BLOCKS // 8, 4)):
        low |= tl.load(bytes_ptr + byte).to(tl.int32) << (8 * byte)
    if BLOCKS <= 32:
        return (low >> blocks) & 1
    high = tl.load(bytes_ptr + 4).to(tl.int32)
    for byte in tl.static_range(1, 4):
        high |= tl.load(bytes_ptr + 4 + byte).to(tl.int32) << (8 * byte)
    return (tl.where(blocks < 32, low, high) >> (blocks % 32)) & 1


@triton.jit
def attend_means(
    q_tile,
    k,
    v,
    k_strides,
    v_strides,
    batch,
    head,
    start,
    num_means,
    dropped,
    count,
    scale_log2,
    running_max,
    running_sum,
    acc,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    # One tile of means, those `dropped` (COLUMNS,); `count` (COLUMNS,) is added to scores, or None.
    k_tile = load_tile(
        k, k_strides, batch, head, start, num_means, HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, True
    )
    v_tile = load_tile(
        v, v_strides, batch, head, start, num_means, HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, True
    )
    scores = dot(q_tile, k_tile.trans())  # (ROWS, BLOCK_D) @ (BLOCK_D, COLUMNS)
    if count is not None:
        scores += count[None, :]
    scores = tl.where(dropped[None, :], scores, float("-inf"))
    probs, rescale, running_max, running_sum = online_softmax(
        scores, scale_log2, running_max, running_sum
    )
    # (ROWS, COLUMNS) @ (COLUMNS, BLOCK_D) -> (ROWS, BLOCK_D)
    acc = acc * rescale[:, None] + dot(probs.to(v_tile.dtype), v_tile)
    return running_max, running_sum, acc


@triton.jit(do_not_specialize=["q_len", "num_means", "max_kv_len"])
def tail_fwd_kernel(
    q,
    k,
    v,
    bits_ptr,
    kv_len_ptr,
    sparse_out_ptr,
    sparse_lse_ptr,
    residual_ptr,
    residual_scale_ptr,
    rho_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    bits_strides,
    sparse_strides,
    out_strides,
    q_len,
    num_means,
    max_kv_len,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TAIL_TOKENS: tl.constexpr,
    LOG2_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    q_start = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    rows = q_start + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    stored = (rows < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    lse_row = (batch.to(tl.int64) * tl.num_programs(1) + head) * q_len

    kv_len = max_kv_len
    if kv_len_ptr is not None:
        kv_len = tl.minimum(tl.load(kv_len_ptr + batch), max_kv_len)

    q_tile = load_tile(
        q, q_strides, batch, head, q_start, q_len, HEAD_DIM, BLOCK_D, ROWS, DESCRIPTORS, True
    )
    running_max = tl.full((ROWS,), LOWEST, tl.float32)
    running_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if sparse_out_ptr is not None:
        sparse = sparse_out_ptr + batch.to(tl.int64) * sparse_strides[0]
        sparse += head.to(tl.int64) * sparse_strides[2]
        sparse_tile = sparse + rows.to(tl.int64)[:, None] * sparse_strides[1] + dims[None, :]
        acc = tl.load(sparse_tile, mask=stored, other=0.0).to(tl.float32)
        lse = tl.load(sparse_lse_ptr + lse_row + rows, mask=rows < q_len, other=float("-inf"))
        nothing = lse == float("-inf")
        running_max = tl.where(nothing, LOWEST, lse / LN_2 - LOG2_TOKENS)
        running_sum = tl.where(nothing, 0.0, 1.0)

    bits_row = (
        bits_ptr
        + batch.to(tl.int64) * bits_strides[0]
        + head.to(tl.int64) * bits_strides[1]
        + (q_start // BLOCK_Q).to(tl.int64) * bits_strides[2]
    )
    complete = kv_len // TAIL_TOKENS // COLUMNS * COLUMNS  # means before it have all their tokens
    for start in tl.range(0, complete, COLUMNS):
        dropped = kept_of_tile(bits_row, start, COLUMNS, TAIL_TOKENS, BLOCK_KV) == 0
        running_max, running_sum, acc = attend_means(
            q_tile, k, v, k_strides, v_strides, batch, head, start, num_means,
            dropped, None, scale_log2, running_max, running_sum, acc,
            HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS,
        )  # fmt: skip
    for start in tl.range(complete, num_means, COLUMNS):
        means = start + tl.arange(0, COLUMNS)
        blocks = means // (BLOCK_KV // TAIL_TOKENS)
        byte = tl.load(bits_row + blocks // 8, mask=means < num_means, other=255)
        kept = (byte.to(tl.int32) >> (blocks % 8)) & 1
        tokens = tl.minimum(kv_len - means * TAIL_TOKENS, TAIL_TOKENS)
        # The softmax scales scores, so the count of tokens is divided by the scale.
        count = tl.log2(tl.maximum(tokens, 1).to(tl.float32) / TAIL_TOKENS) / scale_log2
        running_max, running_sum, acc = attend_means(
            q_tile, k, v, k_strides, v_strides, batch, head, start, num_means,
            (kept == 0) & (tokens > 0), count, scale_log2, running_max, running_sum, acc,
            HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS,
        )  # fmt: skip

    # A row without keys has sum 0: output 0, LSE -inf.
    empty = running_sum == 0.0
    total = tl.where(empty, 1.0, running_sum)
    out = acc / total[:, None]  # (ROWS, BLOCK_D)
    if rho_ptr is not None:
        out *= tl.load(rho_ptr + lse_row + rows, mask=rows < q_len, other=0.0)[:, None]
    if residual_ptr is not None:
        row = (batch.to(tl.int64) * q_len + rows) * tl.num_programs(1) + head  # of (B, S, H)
        part = tl.load(residual_ptr + row[:, None] * HEAD_DIM + dims[None, :], mask=stored, other=0)
        if residual_scale_ptr is not None:
            part = from_fp8(part)
            part *= tl.load(residual_scale_ptr + row, mask=rows < q_len, other=0.0)[:, None]
        out += part.to(tl.float32)
    lse = (running_max + tl.log2(total) + LOG2_TOKENS) * LN_2  # (ROWS,)
    lse = tl.where(empty, float("-inf"), lse)
    out_base = out_ptr + batch.to(tl.int64) * out_strides[0] + head.to(tl.int64) * out_strides[2]
    tl.store(
        out_base + rows.to(tl.int64)[:, None] * out_strides[1] + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=stored,
    )
    tl.store(lse_ptr + lse_row + rows, lse, mask=rows < q_len)


def tail_fwd(
    query: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    bits: Tensor,
    *,
    block_size: tuple[int, int],
    max_kv_len: int,
    tail_tokens: int | None = None,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    sparse: tuple[Tensor, Tensor] | None = None,
    residual: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` over means of the kv blocks that `bits` leaves out.

    Args:
        query: `(B, S, H, D)`, bfloat16, float16 or float32, any strides.
        pooled_key, pooled_value: `(B, ceil(max_kv_len / tail_tokens), H, D)` in the query's dtype,
            means over the valid ones of as many tokens; finite everywhere.
        bits: `(B, H, Nq, ceil(Nkv / 8))` uint8, lowest bit first, 1 for a kept block. B and H may
            be 1 to share one mask.
        block_size: `(block_q, block_kv)` in tokens, each 32, 64 or 128.
        max_kv_len: tokens that the keys were pooled from; Nkv blocks hold them.
        tail_tokens: that a mean speaks for, which divide block_kv; whole blocks by default.
        kv_len: `(B,)` int32, valid keys per sample; all by default.
        scale: softmax scale, 1 / sqrt(D) by default.
        sparse: output `(B, S, H, D)` and LSE `(B, H, S)` float32 of the kept blocks, to be
            completed; None gives the tail alone.
        residual: `(B, S, H, D)` that is added to the output, contiguous; in float8_e4m3fn with a
            factor for each row, `(B, S, H, 1)` float32, else None beside it; then what the output
            is scaled by before, `(B, H, S)` float32, or None.

    Returns:
        The output `(B, S, H, D)` in the query's dtype and the natural-log LSE `(B, H, S)` in
        float32; 0 and -inf where there is nothing to attend to.
    """
    check_tensors(query=query, pooled_key=pooled_key, pooled_value=pooled_value)
    check_block_size(block_size)
    block_q, block_kv = block_size
    tail_tokens = block_kv if tail_tokens is None else tail_tokens
    check_pooled(pooled_key, pooled_value, block_kv, tail_tokens, max_kv_len)
    batch, q_len, heads, head_dim = query.shape
    device = query.device
    scale = head_dim**-0.5 if scale is None else scale
    check_scale(scale)
    bits_shape = (batch, heads, -(-q_len // block_q), -(-max_kv_len // (8 * block_kv)))
    check_index("bits", bits, bits_shape, (torch.uint8,), device)
    bits = (bits if bits.stride(3) == 1 else bits.contiguous()).expand(bits_shape)
    if kv_len is not None:
        check_index("kv_len", kv_len, (batch,), (torch.int32,), device)
        kv_len = kv_len.contiguous()
    sparse_out, sparse_lse = (None, None) if sparse is None else sparse
    if sparse_out is not None:
        check_tensors(query=query, sparse_output=sparse_out)
        check_index("sparse lse", sparse_lse, (batch, heads, q_len), (torch.float32,), device)
        sparse_out = sparse_out if sparse_out.stride(3) == 1 else sparse_out.contiguous()
        sparse_lse = sparse_lse.expand(batch, heads, q_len).contiguous()

    added, added_scale, rho = (None, None, None) if residual is None else residual
    if added is not None and (added.shape != query.shape or not added.is_contiguous()):
        raise ValueError(
            f"the residual must be contiguous and of shape {tuple(query.shape)}, got"
            f" {tuple(added.shape)} with strides {added.stride()}"
        )
    if added_scale is not None:
        added, added_scale = added.view(torch.uint8), added_scale.contiguous()
    if rho is not None:
        check_index("rho", rho, (batch, heads, q_len), (torch.float32,), device)
        rho = rho.contiguous()

    query, pooled_key, pooled_value = (
        x if x.stride(3) == 1 else x.contiguous() for x in (query, pooled_key, pooled_value)
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=device)
    path, dim = load_path(query, pooled_key, pooled_value), padded_head_dim(head_dim)
    descriptors = path == "descriptor"

    def run(tile: Tile) -> None:
        rows, columns = tile.rows, tile.columns
        tail_fwd_kernel[(-(-q_len // rows), heads, batch)](
            q=describe(query, rows) if descriptors else query,
            k=describe(pooled_key, columns) if descriptors else pooled_key,
            v=describe(pooled_value, columns) if descriptors else pooled_value,
            bits_ptr=bits,
            kv_len_ptr=kv_len,
            sparse_out_ptr=sparse_out,
            sparse_lse_ptr=sparse_lse,
            residual_ptr=added,
            residual_scale_ptr=added_scale,
            rho_ptr=rho,
            out_ptr=out,
            lse_ptr=lse,
            q_strides=query.stride(),
            k_strides=pooled_key.stride(),
            v_strides=pooled_value.stride(),
            bits_strides=bits.stride(),
            sparse_strides=out.stride() if sparse_out is None else sparse_out.stride(),
            out_strides=out.stride(),
            q_len=q_len,
            num_means=pooled_key.shape[1],
            max_kv_len=max_kv_len,
            scale_log2=scale * LOG2_E,
            HEAD_DIM=head_dim,
            BLOCK_D=dim,
            BLOCK_Q=block_q,
            BLOCK_KV=block_kv,
            TAIL_TOKENS=tail_tokens,
            LOG2_TOKENS=tail_tokens.bit_length() - 1,
            ROWS=rows,
            COLUMNS=columns,
            DESCRIPTORS=descriptors,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    tile = tile_for(TAIL, device, path, dim, (block_q, 128))  # any number of means
    with torch.cuda.device_of(query):
        launch(("tail_fwd", device, query.dtype, dim, block_q), tile, run)
    return out, lse


def check_pooled(
    key: Tensor, value: Tensor, block_kv: int, tail_tokens: int, max_kv_len: int
) -> None:
    """Raise `ValueError` unless both hold one mean for `tail_tokens` of each block's tokens."""
    if tail_tokens < 1 or block_kv % tail_tokens:
        raise ValueError(
            f"tail_tokens must divide the {block_kv} tokens of a kv block, got {tail_tokens}. "
            "Choose 16, 32, 64 or 128, and no more than a block has."
        )
    means = -(-max_kv_len // tail_tokens)
    if key.shape != value.shape or key.shape[1] != means:
        raise ValueError(
            f"pooled_key and pooled_value must hold {means} means, each of {tail_tokens} of "
            f"{max_kv_len} tokens, got {tuple(key.shape)} and {tuple(value.shape)}. "
            "Pool both with tail_tokens."
        )
