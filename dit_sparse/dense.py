"""Dense attention that also returns its log-sum-exp.

flash-attn-4 gives it, where it is installed and serves the tensors. torch computes it in every
fused kernel but shows it only through private operators; this file is the one place that calls
them. Our own kernel with all blocks kept is the fallback.
"""

import logging

import torch
from torch import Tensor

from .attention import sparse_attention
from .block_mask import BlockMask
from .engines import Problem, fa4, why_not

logger = logging.getLogger(__name__)
_refused: set[Problem] = set()  # what flash-attn-4 has failed with


def dense_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of (B, S, H, D) tensors.

    Args:
        kv_len: (B,) valid keys of each sample; None where all are.

    Returns:
        output (B, Sq, H, D) and lse (B, H, Sq) float32, natural log.
    """
    problem = Problem(query.device, query.dtype, query.shape[-1], (128, 128), kv_len is not None)
    if problem not in _refused and why_not("fa4", problem) is None:
        try:
            return fa4.call(query, key, value)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its compiler has many ways to fail
            _refused.add(problem)
            logger.warning("flash-attn-4 fails with %s; torch's kernel runs instead", error)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    try:
        if kv_len is not None:
            raise NotImplementedError("torch's fast kernels take no valid lengths")
        output, lse = _fused(q, k, v)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError):
        block_mask = BlockMask.full(query.shape[1], key.shape[1], device=query.device)
        return sparse_attention(query, key, value, block_mask, kv_len=kv_len, return_lse=True)
    lse = lse.reshape(*q.shape[:2], -1)[..., : q.shape[2]].float()
    return output.transpose(1, 2), lse


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v: (B, H, S, D)."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    if q.device.type != "cuda":
        raise NotImplementedError
    if q.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] >= 9:
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]
