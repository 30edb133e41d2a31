"""Block-sparse attention in plain torch: it defines what is correct and runs on any device.

Only the kept key blocks are gathered, so that on a CPU sparse is faster than dense.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_mask import BlockMask

GATHERED_ELEMENTS = 1 << 21  # gathered keys of one chunk: near the cache of a CPU


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    precision: str = "full",
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks. Arguments as `dit_sparse.sparse_attention`.

    Returns:
        output (B, Sq, H, D) in the input's dtype, and lse (B, H, Sq) float32, natural log.
        A query block that keeps nothing gives output 0 and lse -inf.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if precision != "full":
        query8, key8, value8, shift = rounded_to_8_bits(
            query, key, value, block_mask.block_size, kv_len, precision
        )
        output, lse = sparse_attention(query8, key8, value8, block_mask, kv_len=kv_len, scale=scale)
        return output.to(query.dtype), lse + shift * scale
    counts, indices = block_mask.indices()
    output = torch.zeros_like(query)
    batch, length, heads, _ = query.shape
    lse = query.new_full((batch, heads, length), -torch.inf, dtype=torch.float32)
    for b in range(batch):
        keys = block_mask.kv_len
        keys = keys if kv_len is None else min(int(kv_len[b]), keys)  # a block's padding is no key
        for h in range(heads):
            mask_b, mask_h = b % counts.shape[0], h % counts.shape[1]
            out_rows, lse_rows = _one_head(
                query[b, :, h],
                key[b, :, h],
                value[b, :, h],
                counts[mask_b, mask_h],
                indices[mask_b, mask_h],
                block_mask.block_size,
                keys,
                scale,
            )
            output[b, :, h], lse[b, h] = out_rows, lse_rows
    return output, lse


def rounded_to_8_bits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: tuple[int, int],
    kv_len: Tensor | None = None,
    precision: str = "int8",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What 8 bits with one scale a block keep; see `kernels/quantize.py`.

    Returns:
        Queries, keys less their mean, and values, which "int8" leaves as they are, in float32; and
        what every logit of a query lost with the mean before it is scaled, (B, H, Sq).
    """
    query, key, value = query.float(), key.float(), value.float()
    blocks = block_lengths(key.shape[1], block_size[1], kv_len, key.device).gt(0).sum(1)  # (B,)
    mean = block_pool(key, block_size[1], kv_len).sum(2)  # (B, H, D)
    mean = mean / blocks.clamp_min(1)[:, None, None]
    shift = (query.transpose(1, 2) @ mean.unsqueeze(-1)).squeeze(-1)
    key = key - mean.unsqueeze(1)
    if kv_len is not None:
        padded = torch.arange(key.shape[1], device=key.device) >= kv_len.to(key.device)[:, None]
        key, value = (x.masked_fill(padded[..., None, None], 0) for x in (key, value))
    query = _rounded(query, block_size[0], precision)
    key = _rounded(key, block_size[1], precision)
    value = value if precision == "int8" else _rounded(value, block_size[1], precision)
    return query, key, value, shift


def _rounded(x: Tensor, block_size: int, precision: str) -> Tensor:
    """(B, S, H, D) rounded to 8 bits of each block's and head's largest magnitude."""
    blocks = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block_size)).unflatten(1, (-1, block_size))
    limit = 127.0 if precision == "int8" else 448.0
    largest = blocks.abs().amax((2, 4), keepdim=True).clamp_min(1e-20)
    blocks = blocks * (limit / largest)
    if precision == "int8":
        blocks = (blocks + 0.5).floor()
    else:
        blocks = blocks.to(torch.float8_e4m3fn).float()
    return (blocks * (largest / limit)).flatten(1, 2)[:, : x.shape[1]]


def _one_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    block_size: tuple[int, int],
    kv_len: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One sample and head: query (Sq, D), key and value (Sk, D), counts (Nq,), indices (Nq, K)."""
    length, dim = query.shape
    q_blocks = _blocks(query, block_size[0])  # (Nq, bq, D)
    k_blocks, v_blocks = _blocks(key, block_size[1]), _blocks(value, block_size[1])
    output = torch.zeros_like(q_blocks)
    lse = query.new_full(q_blocks.shape[:2], -torch.inf, dtype=torch.float32)
    per_chunk = max(1, GATHERED_ELEMENTS // max(1, indices.shape[1] * block_size[1] * dim))
    # rows with equally many blocks go together, so that none computes padding
    for count in counts[counts > 0].unique().tolist():
        rows = (counts == count).nonzero().flatten()
        for chunk in rows.split(per_chunk):
            kept = indices[chunk, :count].long()  # (rows, count)
            output[chunk], lse[chunk] = _attend(
                q_blocks[chunk],
                k_blocks[kept].flatten(1, 2),
                v_blocks[kept].flatten(1, 2),
                _key_bias(kept, block_size[1], kv_len),
                scale,
            )
    return output.flatten(0, 1)[:length], lse.flatten()[:length]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """query (R, bq, D), key and value (R, K, D), bias (R, 1, K) or None."""
    if query.device.type == "cpu":
        # torch's fused CPU kernel also returns the log-sum-exp, in natural log
        mask = None
        if bias is not None:
            mask = bias.to(query.dtype).expand(-1, query.shape[1], -1).unsqueeze(1)
        q, k, v = (x.unsqueeze(1) for x in (query, key, value))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(q, k, v, attn_mask=mask, scale=scale)
        lse = lse.squeeze(1).float()
        if bias is not None:  # the kernel gives 0 to a row without keys
            lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        return out.squeeze(1), lse
    scores = (query @ key.transpose(-1, -2)).float() * scale
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1)
    empty = (lse == -torch.inf).unsqueeze(-1)  # a row without keys
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(empty, 0)
    return weights.to(value.dtype) @ value, lse


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """(S, D) -> (N, block, D), zero-padded at the end."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % block_size)).unflatten(0, (-1, block_size))


def _key_bias(kept: Tensor, block_size: int, kv_len: int) -> Tensor | None:
    """-inf at gathered positions beyond the last valid key, or None where there are none."""
    if int(kept.max()) * block_size + block_size <= kv_len:
        return None
    position = kept.unsqueeze(-1) * block_size + torch.arange(block_size, device=kept.device)
    bias = torch.where(position < kv_len, 0.0, -torch.inf)
    return bias.flatten(1).unsqueeze(1)


def block_mass(
    query: Tensor, key: Tensor, lse: Tensor, block_size: tuple[int, int], scale: float | None = None
) -> Tensor:
    """Softmax mass of each block: sum over its pairs of exp(q.k * scale - lse).

    AdaSpa (arXiv 2502.21079), section 4; with a current lse each row of blocks sums to the number
    of its queries.

    Args:
        query, key: (B, S, H, D). lse: (B, H, Sq), natural log.

    Returns:
        (B, H, Nq, Nk) float32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bq, bk = block_size
    keys = key.permute(0, 2, 3, 1).flatten(0, 1).float().contiguous()  # (B*H, D, Sk)
    shift = lse.flatten(0, 1).unsqueeze(-1).neg()  # a row without keys has no mass
    shift = shift.masked_fill(shift == torch.inf, -torch.inf)
    rows = []
    for start in range(0, query.shape[1], bq):
        q = query[:, start : start + bq].transpose(1, 2).flatten(0, 1).float() * scale
        mass = torch.baddbmm(shift[:, start : start + bq], q, keys).exp_().sum(1)  # (B*H, Sk)
        rows.append(F.pad(mass, (0, -mass.shape[-1] % bk)).unflatten(-1, (-1, bk)).sum(-1))
    return torch.stack(rows, dim=1).unflatten(0, lse.shape[:2])


def block_pool(x: Tensor, block_size: int, kv_len: Tensor | None = None) -> Tensor:
    """Mean of each block of tokens: (B, S, H, D) -> (B, H, N, D) float32.

    Args:
        kv_len: (B,) valid tokens of each sample; None where all are. A block without any is 0.
    """
    if kv_len is not None:
        padded = torch.arange(x.shape[1], device=x.device) >= kv_len.to(x.device)[:, None]
        x = x.masked_fill(padded[..., None, None], 0)
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % block_size))
    sums = padded.unflatten(1, (-1, block_size)).sum(2).transpose(1, 2)  # (B, H, N, D)
    lengths = block_lengths(x.shape[1], block_size, kv_len, x.device)
    return sums / lengths.clamp_min(1)[:, None, :, None]


def block_lengths(
    tokens: int, block_size: int, kv_len: Tensor | None, device: torch.device
) -> Tensor:
    """Valid tokens of each block, (B, N) int64; B is 1 without `kv_len` (B,)."""
    start = torch.arange(0, tokens, block_size, device=device)
    end = torch.tensor([tokens], device=device) if kv_len is None else kv_len.to(device)
    return (end.clamp(max=tokens)[:, None] - start).clamp(0, block_size)
