"""What a sparse output lacks of the dense one, measured at one step and added at later ones.

With rho = exp(LSE_sparse - LSE_dense), the share of a row's softmax mass inside the mask, and
R = O_dense - rho O_sparse, the contribution of the keys outside (Re-ttention, Eq. 10), the dense
output is rho O_sparse + R at the step where they are measured, and nearly so at the next.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import block_pool


@dataclass(frozen=True)
class Correction:
    """rho (B, H, S) float32, and the residual (B, ceil(S / pool), H, D), means over `pool` tokens.

    With a pool of 1 the residual is whole.
    """

    rho: Tensor
    residual: Tensor
    pool: int

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.rho, self.residual))


def measure_correction(
    dense: Tensor, dense_lse: Tensor, sparse: Tensor, sparse_lse: Tensor, pool: int = 1
) -> Correction:
    """From one step's dense and sparse outputs (B, S, H, D) and log-sum-exps (B, H, S)."""
    rho = (sparse_lse - dense_lse).exp().clamp(max=1.0)  # rounding may pass 1
    residual = dense.float() - per_row(rho) * sparse.float()
    if pool > 1:
        residual = block_pool(residual, pool).transpose(1, 2)
    return Correction(rho, residual.to(dense.dtype), pool)


def apply_correction(
    sparse: Tensor, correction: Correction, ramp: float = 0.0, clamp: bool = False
) -> Tensor:
    """rho O_sparse + R, with rho raised by `ramp`, as a cached mask holds more and more mass or so
    the paper supposes.

    Args:
        clamp: keep rho at most 1 and shrink R with the mass that is left for it, (1 - rho) of what
            it was, so that a row's weights still sum to 1.
    """
    rho, residual = correction.rho + ramp, correction.residual.float()
    if correction.pool > 1:
        residual = residual.repeat_interleave(correction.pool, 1)[:, : sparse.shape[1]]
    if clamp:
        rho = rho.clamp(max=1.0)
        left = (1 - rho) / (1 - correction.rho).clamp_min(torch.finfo(rho.dtype).eps)
        residual = residual * per_row(left)
    return (per_row(rho) * sparse.float() + residual).to(sparse.dtype)


def per_row(x: Tensor) -> Tensor:
    """(B, H, S) -> (B, S, H, 1)."""
    return x.transpose(1, 2).unsqueeze(-1)
