"""Our own Triton kernels."""

import torch
from torch import Tensor

from ..block_mask import BlockMask


def missing(device: torch.device | str) -> str | None:
    if torch.device(device).type != "cuda":
        return f"its kernels need a GPU and the tensors are on {torch.device(device).type}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


def unfit(problem) -> str | None:
    return None


def attend(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, *, kv_len, scale
) -> tuple[Tensor, Tensor]:
    from ..kernels.block_sparse_fwd import block_sparse_fwd

    counts, indices = block_mask.indices()
    own_lists = block_mask.bits.shape[:2] == (query.shape[0], query.shape[2])
    return block_sparse_fwd(
        query,
        key,
        value,
        counts,
        indices,
        block_size=block_mask.block_size,
        scale=scale,
        kv_len=None if kv_len is None else kv_len.to(query.device, torch.int32),
        order=block_mask.work_order if own_lists else None,
    )
