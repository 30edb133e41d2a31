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
    if problem.precision == "full":
        return None
    if problem.dtype == torch.float32 or problem.head_dim <= 16:
        return (
            "INT8 products take bfloat16 and float16 and head dims from 17, not"
            f" {problem.dtype} and {problem.head_dim}"
        )
    if problem.device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(problem.device)
        if major < 8:
            return f"INT8 products need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    kv_len,
    scale,
    precision: str = "full",
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
        precision=precision,
    )
