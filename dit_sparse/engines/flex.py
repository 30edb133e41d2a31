"""torch's FlexAttention, compiled on a GPU. On a CPU it runs uncompiled: exact, slow, for tests."""

from functools import cache

import torch
from torch import Tensor

from ..block_mask import BlockMask


def missing(device: torch.device | str) -> str | None:
    try:
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: F401
    except ImportError:
        return "this torch has no FlexAttention that returns the log-sum-exp (2.9 or newer has)"
    if torch.device(device).type == "cpu":
        return None
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed, which torch.compile needs for FlexAttention"
    return None


def unfit(problem) -> str | None:
    if problem.precision != "full":
        return f"FlexAttention takes precision='full', not {problem.precision!r}"
    if problem.head_dim < 16:
        return f"FlexAttention takes head dims from 16, not {problem.head_dim}"
    return None


@cache
def compiled():
    from torch.nn.attention.flex_attention import flex_attention

    # A full graph raises when it is compiled too often; otherwise it would fall back to an
    # uncompiled run that holds every score in memory.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


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
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    run = compiled() if query.device.type == "cuda" else flex_attention
    output, aux = run(
        *(x.transpose(1, 2) for x in (query, key, value)),
        block_mask=block_mask.to_flex(kv_len),
        scale=scale,
        kernel_options=tiles(block_mask.block_size),
        return_aux=AuxRequest(lse=True),
    )
    return output.transpose(1, 2), aux.lse.float()


def tiles(block_size: tuple[int, int]) -> dict[str, int] | None:
    """Its default tiles are up to 128 tokens long and must divide the blocks."""
    if min(block_size) >= 128:
        return None
    return {"BLOCK_M": min(block_size[0], 128), "BLOCK_N": min(block_size[1], 64)}
