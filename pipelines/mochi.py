"""Mochi: joint attention over [video, text]; each sample attends to as much text as its prompt has.

Frequencies of RoPE are learned, for each head its own, so its tables are (S, H, D / 2).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import VideoGrid
from ..step import attend
from .cogvideox import torch_attention
from .family import CurrentCall, Family, Prepared, Undo
from .hunyuan_video import project, valid_lengths


class MochiSparseAttnProcessor:
    """The stock processor, with the attention itself handed to a layer of ours.

    Args:
        slot: 0-d int64 CPU tensor that names the layer.
    """

    def __init__(self, slot: Tensor):
        self.slot = slot

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,  # `prepare` read it
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        length, joint = hidden_states.shape[1], []
        for part in ("q", "k", "v"):
            video = project(attn, hidden_states, f"to_{part}", f"norm_{part}")
            text = project(attn, encoder_hidden_states, f"add_{part}_proj", f"norm_added_{part}")
            if image_rotary_emb is not None and part != "v":
                video = _rotate(video, *image_rotary_emb)
            joint.append(torch.cat([video, text], dim=1))
        query, key, value = joint
        output = attend(query, key, value, self.slot).flatten(2, 3)  # (B, S, H * D)
        video, text = output[:, :length], output[:, length:]
        video = attn.to_out[1](attn.to_out[0](video))
        if not attn.context_pre_only:  # the last block has no use for the text
            text = attn.to_add_out(text)
        return video, text

    def dense(self, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None) -> Tensor:
        """torch's own choice, sample by sample where texts differ in length, 0 behind each.

        diffusers gives Mochi no attention backends. One host sync where the lengths differ.
        """
        if kv_len is None:
            return torch_attention(query, key, value)
        output = torch.zeros_like(query)
        for i, valid in enumerate(kv_len.tolist()):
            one = (x[i : i + 1, :valid] for x in (query, key, value))
            output[i : i + 1, :valid] = torch_attention(*one)
        return output


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs: x (B, S, H, D), cos and sin (S, H, D / 2) in float32."""
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = even * cos - odd * sin, even * sin + odd * cos
    return torch.stack([pair.to(x.dtype) for pair in pairs], dim=-1).flatten(3)


def prepare(transformer: Any, given: dict[str, Any], keep_padding: bool) -> Prepared:
    """The latent video is (B, C, T, H, W); text behind the longest prompt of the batch is cut."""
    frames, height, width = given["hidden_states"].shape[2:]
    text, mask = given["encoder_hidden_states"], given["encoder_attention_mask"]
    counts, patch = _counts(mask.bool()), transformer.config.patch_size
    slots = mask.shape[1] if keep_padding else max(1, *counts)
    grid = VideoGrid(frames, height // patch, width // patch, text_tokens=slots)
    cut = {"encoder_hidden_states": text[:, :slots], "encoder_attention_mask": mask[:, :slots]}
    return Prepared(grid, valid_lengths(grid, counts), cut)


def _counts(mask: Tensor) -> list[int]:
    """Valid text tokens of each sample. One host sync."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    counts, ends = torch.stack([mask.sum(1), (mask * places).amax(1)]).tolist()
    if counts != ends:
        raise ValueError(
            "sparse attention for Mochi needs the valid text tokens of each prompt in front, and"
            f" encoder_attention_mask has {counts} of them that end at {ends}: move them to the"
            " front, or disable sparse attention"
        )
    return counts


def self_attentions(transformer: Any) -> Iterator[nn.Module]:
    for block in transformer.transformer_blocks:
        yield block.attn1


def hooks(transformer: Any, call: CurrentCall) -> Iterator[Undo]:
    """Block order behind the patch embedding and RoPE, raster order before the output norm."""

    def patches(module, args, output: Tensor) -> Tensor:  # (B * T, H * W, C), forward joins them
        order = call.order(output)
        if order is None:
            return output
        return output.unflatten(0, (-1, call.grid.frames)).flatten(1, 2)[:, order]

    def rope(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        order = call.order(output[0])
        return output if order is None else tuple(table[order] for table in output)

    def restore(module, args: tuple[Tensor]) -> tuple[Tensor, ...]:  # (B, S, C)
        return call.restored(args[0]), *args[1:]

    yield transformer.patch_embed.register_forward_hook(patches).remove
    yield transformer.rope.register_forward_hook(rope).remove
    yield transformer.norm_out.register_forward_pre_hook(restore).remove


MOCHI = Family(
    name="Mochi",
    transformers=("MochiTransformer3DModel",),
    pipelines=("MochiPipeline",),
    guidance="one batch",
    text="after the video",
    fps=30,
    stock_processor="MochiAttnProcessor2_0",
    processor=MochiSparseAttnProcessor,
    prepare=prepare,
    self_attentions=self_attentions,
    hooks=hooks,
)
