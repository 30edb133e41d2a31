"""Rotary position embedding of CogVideoX and HunyuanVideo."""

import torch
from torch import Tensor


def rotate_(x: Tensor, rotary_emb: tuple[Tensor, Tensor], dim: int) -> None:
    """What diffusers' `apply_rotary_emb` gives, in place and without copies of x in float32.

    Args:
        x: (B, H, S, D) or (B, S, H, D), all tokens rotated.
        rotary_emb: cos and sin, (S, D), one of each for both numbers of a pair.
        dim: of the tokens.
    """
    cos, sin = (table.to(x.device, torch.float32).unsqueeze(2 - dim) for table in rotary_emb)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    x.copy_((x * cos).add_(turned * sin))
