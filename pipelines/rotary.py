"""Rotary position embedding of CogVideoX and HunyuanVideo."""

import torch
from torch import Tensor


def rotate_(x: Tensor, rotary_emb: tuple[Tensor, Tensor], dim: int) -> None:
    """What diffusers' `apply_rotary_emb` gives, bit for bit, in place and with fewer copies of x.

    Args:
        x: (B, H, S, D) or (B, S, H, D), all tokens rotated.
        rotary_emb: cos and sin, (S, D), of at most float32, one of each for both numbers of a pair.
        dim: of the tokens.
    """
    cos, sin = (table.to(x.device, torch.float32).unsqueeze(2 - dim) for table in rotary_emb)
    given = x.float() if x.dtype == torch.float64 else x
    turned = torch.stack([-given[..., 1::2], given[..., 0::2]], dim=-1).flatten(-2)
    x.copy_((given * cos).add_(turned * sin))
