"""Our own Triton kernels."""

import torch
from torch import Tensor

from ..block_mask import BlockMask

CAPABILITIES = {"INT8": (8, 0), "FP8": (8, 9)}


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
    name = problem.precision.upper()
    if problem.dtype == torch.float32 or problem.head_dim <= 16:
        return (
            f"{name} products take bfloat16 and float16 and head dims from 17, not"
            f" {problem.dtype} and {problem.head_dim}"
        )
    if problem.device.type == "cuda" and torch.version.hip:
        return f"{name} products were not tried on AMD GPUs" if name == "FP8" else None
    if problem.device.type == "cuda":
        found, needed = torch.cuda.get_device_capability(problem.device), CAPABILITIES[name]
        if found < needed:
            return (
                f"{name} products need compute capability {needed[0]}.{needed[1]}, and this GPU"
                f" has {found[0]}.{found[1]}"
            )
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
