"""The tail: what a block mask leaves out, told by means of its tokens.

For a query and `tail_tokens` keys m in a row, of a block that its mask drops, these keys are
replaced by their mean: logit q . mean(k_m) * scale + log(tokens in m), value mean(v_m), in the same
softmax as the keys that are kept. LLSA attends to such means of all blocks, whole ones; here only
of those that are not attended to already, so nothing is counted twice. Multiply-adds:
1 / tail_tokens of a dense call; nothing is kept between steps.

By Jensen's inequality the tail holds less mass than what it stands for, the less so the fewer
tokens a mean has, and is left like that: tried on queries and keys of a small Wan, with means of
whole blocks, raising its logits by half the variance of a block's keys made outputs much worse, and
shifting them to a mass measured some steps before a little worse.
"""

import torch
from torch import Tensor

from .attention import own_engine
from .block_mask import BlockMask
from .patterns.correct import Correction, add_residual
from .reference import block_lengths, block_pool

CHUNK_ELEMENTS = 1 << 24  # logits held at once by the tail in plain torch: 64 MiB


def tail_cost(block_mask: BlockMask, tail_tokens: int) -> float:
    """Multiply-adds of the tail over those of a dense call: all pooled keys meet all queries."""
    return -(-block_mask.kv_len // tail_tokens) / block_mask.kv_len


def add_tail(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    tail_tokens: int | None = None,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
    residual: Correction | None = None,
) -> tuple[Tensor, Tensor]:
    """A sparse output completed by the tail of its mask.

    Args:
        output, lse: (B, Sq, H, D) and (B, H, Sq) float32, what `sparse_attention` gave for the
            other arguments, which are as there.
        tail_tokens: key tokens of a mean, which divide a block's; whole blocks by default.
        residual: added to the output, as `patterns.correct.add_residual` does.

    Returns:
        (B, Sq, H, D) and the log-sum-exp (B, H, Sq) float32 of both parts. Where the mask keeps
        everything, what was given.
    """
    if own_engine(engine, query, block_mask.block_size) == "triton":
        sparse = output, lse
        return _triton(query, key, value, block_mask, tail_tokens, kv_len, scale, sparse, residual)
    tail = tail_attention(
        query,
        key,
        value,
        block_mask,
        tail_tokens=tail_tokens,
        kv_len=kv_len,
        scale=scale,
        engine="torch",
    )
    output, lse = merge((output, lse), tail)
    return output if residual is None else add_residual(output, residual), lse


def tail_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    tail_tokens: int | None = None,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over means of the dropped blocks alone. Arguments as `add_tail`.

    Returns:
        output (B, Sq, H, D) and lse (B, H, Sq) float32, natural log; 0 and -inf for a query block
        that drops nothing.
    """
    if own_engine(engine, query, block_mask.block_size) == "triton":
        return _triton(query, key, value, block_mask, tail_tokens, kv_len, scale, None)
    bq, bk = block_mask.block_size
    size = _tokens_of_mean(block_mask, tail_tokens)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (block_pool(x, size, kv_len) for x in (key, value))  # (B, H, means, D)
    tokens = block_lengths(block_mask.kv_len, size, kv_len, query.device)
    bias = tokens.log()[:, None, None]  # (B or 1, 1, 1, means); -inf for a mean without tokens
    kept = block_mask.to_dense()
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=torch.float32)
    row = query.shape[0] * query.shape[2] * bq * keys.shape[2]
    blocks_at_once = max(1, CHUNK_ELEMENTS // row)
    for first in range(0, kept.shape[2], blocks_at_once):
        rows = slice(first * bq, (first + blocks_at_once) * bq)
        q = query[:, rows].transpose(1, 2).float()  # (B, H, rows, D)
        mask = kept[:, :, first : first + blocks_at_once].repeat_interleave(bq, 2)
        mask = mask.repeat_interleave(bk // size, 3)[..., : keys.shape[2]]
        scores = q @ keys.mT * scale + bias  # (B, H, rows, means)
        scores = scores.masked_fill(mask[:, :, : q.shape[2]], -torch.inf)
        lse[..., rows] = scores.logsumexp(-1)
        weights = scores.softmax(-1).nan_to_num(0.0)  # a row that drops nothing
        output[:, rows] = (weights @ values).transpose(1, 2).to(output.dtype)
    return output, lse


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from each one's output and log-sum-exp.

    Shapes (B, S, H, D) and (B, H, S). Where one set is empty (-inf), the other is given back.
    """
    (out_a, lse_a), (out_b, lse_b) = first, second
    lse = torch.logaddexp(lse_a, lse_b)
    share = (lse_b - lse).exp().nan_to_num(0.0)  # NaN where both are empty
    share = share.transpose(1, 2).unsqueeze(-1)  # (B, S, H, 1)
    return out_a.float().lerp(out_b.float(), share).to(out_a.dtype), lse


def _tokens_of_mean(block_mask: BlockMask, tail_tokens: int | None) -> int:
    block_kv = block_mask.block_size[1]
    size = block_kv if tail_tokens is None else tail_tokens
    if size < 1 or block_kv % size:
        raise ValueError(
            f"tail_tokens must divide the {block_kv} tokens of a key block, got {size}: choose 16,"
            " 32, 64 or 128, and no more than a block has"
        )
    return size


def _triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    tail_tokens: int | None,
    kv_len: Tensor | None,
    scale: float | None,
    sparse: tuple[Tensor, Tensor] | None,
    residual: Correction | None = None,
) -> tuple[Tensor, Tensor]:
    from .kernels.block_pool import pool_keys_values
    from .kernels.tail_fwd import tail_fwd

    kv_len = None if kv_len is None else kv_len.to(query.device, torch.int32)
    size = _tokens_of_mean(block_mask, tail_tokens)
    pooled = pool_keys_values(key, value, size, kv_len)
    keys, values = (means.transpose(1, 2) for means in pooled)  # (B, means, H, D)
    return tail_fwd(
        query,
        keys,
        values,
        block_mask.bits,
        block_size=block_mask.block_size,
        max_kv_len=block_mask.kv_len,
        tail_tokens=size,
        kv_len=kv_len,
        scale=scale,
        sparse=sparse,
        residual=None if residual is None else (residual.residual, residual.scale, residual.rho),
    )
