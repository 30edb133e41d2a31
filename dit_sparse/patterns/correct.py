"""What a sparse output lacks of the dense one, measured at one step and added at later ones.

With rho = exp(LSE_sparse - LSE_dense), the share of a row's softmax mass inside the mask, and
R = O_dense - rho O_sparse, the contribution of the keys outside (Re-ttention, Eq. 10), the dense
output is rho O_sparse + R at the step where they are measured, and nearly so at the next. Where a
tail speaks for the keys outside (`dit_sparse/tail.py`), rho may be another factor; R is always what
the scaled output lacked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..reference import block_pool

FP8 = torch.float8_e4m3fn
CHUNK_ELEMENTS = 1 << 26  # of an output in float32 at once: 256 MiB


@dataclass(frozen=True)
class Correction:
    """What is kept of a step where dense attention ran.

    Attributes:
        residual: (B, ceil(S / pool), H, D), means over `pool` tokens; with a pool of 1 it is whole.
        rho: (B, H, S) float32, what sparse outputs are scaled by, None where they are not.
        scale: (B, S, H, 1) float32, what a residual in fp8 is multiplied by; None in other dtypes.
    """

    residual: Tensor
    rho: Tensor | None = None
    pool: int = 1
    scale: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.residual.shape[0]

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.residual, self.rho, self.scale) if x is not None]

    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Correction":
        """The same with each tensor changed."""
        rho, scale = (None if x is None else change(x) for x in (self.rho, self.scale))
        return replace(self, residual=change(self.residual), rho=rho, scale=scale)


def measure_correction(
    dense: Tensor, dense_lse: Tensor, sparse: Tensor, sparse_lse: Tensor, pool: int = 1
) -> Correction:
    """From one step's dense and sparse outputs (B, S, H, D) and log-sum-exps (B, H, S)."""
    rho = (sparse_lse - dense_lse).exp().clamp(max=1.0)  # rounding may pass 1
    residual = dense.float() - per_row(rho) * sparse.float()
    if pool > 1:
        residual = block_pool(residual, pool).transpose(1, 2)
    return Correction(residual.to(dense.dtype), rho, pool)


def apply_correction(
    sparse: Tensor, correction: Correction, ramp: float = 0.0, clamp: bool = False
) -> Tensor:
    """rho O_sparse + R, with rho raised by `ramp`, as a cached mask holds more and more mass or so
    the paper supposes.

    Args:
        clamp: keep rho at most 1 and shrink R with the mass that is left for it, (1 - rho) of what
            it was, so that a row's weights still sum to 1.
    """
    assert correction.rho is not None, "measured without log-sum-exps: see add_residual"
    rho, residual = correction.rho + ramp, correction.residual.float()
    if correction.pool > 1:
        residual = residual.repeat_interleave(correction.pool, 1)[:, : sparse.shape[1]]
    if clamp:
        rho = rho.clamp(max=1.0)
        left = (1 - rho) / (1 - correction.rho).clamp_min(torch.finfo(rho.dtype).eps)
        residual = residual * per_row(left)
    return (per_row(rho) * sparse.float() + residual).to(sparse.dtype)


@torch.no_grad()
def measure_residual(
    dense: Tensor, sparse: Tensor, fp8: bool = False, rho: Tensor | None = None
) -> Correction:
    """What one step's sparse output lacks of the dense one, both (B, S, H, D).

    Args:
        fp8: keep it in float8_e4m3fn with a scale for each row of D, not in the dtype of `dense`.
        rho: (B, H, S) float32, what the sparse output is scaled by, now and later.
    """
    residual = torch.empty(dense.shape, dtype=FP8 if fp8 else dense.dtype, device=dense.device)
    scale = dense.new_empty(*dense.shape[:3], 1, dtype=torch.float32) if fp8 else None
    at_once = max(CHUNK_ELEMENTS // dense[:, 0].numel(), 1)
    for first in range(0, dense.shape[1], at_once):  # few passes, since outputs are large
        rows = slice(first, first + at_once)
        given = sparse[:, rows] if rho is None else per_row(rho[..., rows]) * sparse[:, rows]
        lacked = (dense[:, rows].float() - given).float()
        if scale is not None:
            factor = scale[:, rows]
            torch.linalg.vector_norm(lacked, torch.inf, -1, keepdim=True, out=factor)
            factor.div_(torch.finfo(FP8).max).clamp_min_(torch.finfo(torch.float32).tiny)
            lacked.div_(factor)
        residual[:, rows] = lacked
    return Correction(residual, rho, scale=scale)


def add_residual(sparse: Tensor, correction: Correction) -> Tensor:
    """rho O_sparse + R, (B, S, H, D) in the dtype of `sparse`."""
    residual, output = correction.residual.float(), sparse.float()
    if correction.scale is not None:
        residual = residual * correction.scale
    if correction.rho is not None:
        output = output * per_row(correction.rho)
    return (output + residual).to(sparse.dtype)


def per_row(x: Tensor) -> Tensor:
    """(B, H, S) -> (B, S, H, 1)."""
    return x.transpose(1, 2).unsqueeze(-1)
