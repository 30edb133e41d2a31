"""flash-attn-4 (extra `fa4`): its block-sparse forward on Hopper, fed from the same mask.

Facts of its interface, read in 4.0.0b36:

- `block_size` names the sparse block; on Hopper the tile of keys must equal it, which holds up to
  128 keys for head dims up to 128, and the tile of queries (64 or 128) must divide it.
- Only the last entry of a list is masked at the end of the keys: ascending lists put the short
  block there.
- On data-centre Blackwell a block of queries must be a multiple of 256, which we do not cut; on
  other GPUs its block sparsity is unproven. There our own kernels run.
"""

import inspect
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask

KNOWN = "4.0.0b36"


def missing(device: torch.device | str) -> str | None:
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip:
        return f"flash-attn-4 needs an NVIDIA GPU and the tensors are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return (
            "flash-attn-4 is used on Hopper only (compute capability 9.0), and this GPU has"
            f" {major}.{minor}"
        )
    return mismatch()


def unfit(problem) -> str | None:
    if problem.precision != "full":
        return f"flash-attn-4 takes precision='full', not {problem.precision!r}"
    if problem.lengths:
        return "flash-attn-4 takes no valid length per sample beside a block mask"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn-4 takes bfloat16 and float16, not {problem.dtype}"
    if problem.head_dim % 8 or problem.head_dim > 128:
        return f"flash-attn-4 takes head dims in multiples of 8 up to 128, not {problem.head_dim}"
    if problem.block_size[0] % 64:
        return f"flash-attn-4 takes query blocks of 64 or 128 tokens, not {problem.block_size[0]}"
    return None


def is_faster(problem) -> bool:
    """Where it beat our kernels when both were measured, and can run."""
    measured = problem.block_size == (128, 128) and problem.head_dim == 128
    return measured and unfit(problem) is None and missing(problem.device) is None


@cache
def mismatch() -> str | None:
    """None where the installed flash-attn-4 has the interface that we call."""
    try:
        installed = version("flash-attn-4")
    except PackageNotFoundError:
        installed = None
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import flash_attn_func
    except ModuleNotFoundError as error:
        if installed is None and (error.name or "").startswith("flash_attn"):
            return "flash-attn-4 is not installed (pip install --pre 'dit-sparse[fa4]')"
        return f"flash-attn-4 {installed or ''} does not import: {error}"
    except Exception as error:  # its compiler checks driver and versions on import
        return f"flash-attn-4 {installed or ''} does not import: {error}"
    wanted = {"block_sparse_tensors", "return_lse", "softmax_scale"}
    lacking = wanted - set(inspect.signature(flash_attn_func).parameters)
    lacking |= {"full_block_cnt", "full_block_idx", "block_size"} - set(
        BlockSparseTensorsTorch._fields
    )
    if lacking:
        return (
            f"flash-attn-4 {installed or ''} lacks {', '.join(sorted(lacking))};"
            f" {KNOWN} is known to have the interface we call"
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
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    lists = BlockSparseTensorsTorch(**block_mask.to_fa4())
    return call(query, key, value, softmax_scale=scale, block_sparse_tensors=lists)


def call(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and natural-log LSE, of all keys unless `options` say otherwise."""
    from flash_attn.cute.interface import flash_attn_func

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output, lse = flash_attn_func(query, key, value, return_lse=True, **options)[:2]
    return output, lse
