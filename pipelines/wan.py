"""Wan 2.1 and 2.2, VACE too: video-only self-attention in `attn1`, text in a cross-attention."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ..grid import VideoGrid
from ..step import attend
from .family import CurrentCall, Family, Prepared, Undo


class WanSparseAttnProcessor:
    """The stock processor's self-attention, with the attention itself handed to a layer of ours.

    Args:
        slot: 0-d int64 CPU tensor that names the layer.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, slot: Tensor):
        self.slot = slot

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this processor is for self-attention without a mask")
        query, key, value = _projections(attn, hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query = _rotate(query, *rotary_emb)
            key = _rotate(key, *rotary_emb)
        output = attend(query, key, value, self.slot)  # (B, S, H, D)
        output = output.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))

    def dense(self, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None) -> Tensor:
        """The user's own attention backend."""
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


def _projections(attn: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(x).chunk(3, dim=-1)
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs: x (B, S, H, D), cos and sin (1, S, 1, D)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = x.new_empty(x.shape)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


def prepare(transformer: Any, given: dict[str, Any], keep_padding: bool) -> Prepared:
    """The latent video is (B, C, T, H, W); no text in self-attention.

    One host sync where a model can be given frames, none for text-to-video.
    """
    config = transformer.config
    latents = given["hidden_states"].shape[2:]
    frames, height, width = (n // p for n, p in zip(latents, config.patch_size))
    conditions = _given_frames(config, given)
    leading = 0 if conditions is None else int(conditions.long().cumprod(0).sum())
    return Prepared(VideoGrid(frames, height, width, conditioning_frames=leading))


def _given_frames(config: Any, given: dict[str, Any]) -> Tensor | None:
    """Latent frames that are conditions as a whole, (T,) bool; patches are one frame deep.

    The last latent frame of first-and-last-frame models is not: it holds four frames of the video,
    and only one of them is given.
    """
    latents, timestep = given["hidden_states"], given["timestep"]
    if given.get("control_hidden_states") is not None:  # VACE: [kept, repainted, mask of it]
        control = given["control_hidden_states"][:, latents.shape[1] :]
        return ~control.any((0, 1, 3, 4))
    if timestep.ndim == 2:  # TI2V-5B: (B, S), 0 at tokens that are given
        return ~timestep.unflatten(1, (latents.shape[2], -1)).any((0, 2))
    channels = config.out_channels or config.in_channels
    mask = latents[:, channels:-channels]  # image-to-video and Animate: [noisy, mask, condition]
    return mask.amin((0, 1, 3, 4)) == 1 if mask.shape[1] else None


def self_attentions(transformer: Any) -> Iterator[nn.Module]:
    """Those of VACE's control stream, which is as long as the video, come last."""
    for block in [*transformer.blocks, *getattr(transformer, "vace_blocks", ())]:
        yield block.attn1


def hooks(transformer: Any, call: CurrentCall) -> Iterator[Undo]:
    """Hooks that put the tokens in block order once a call, and back before the output norm.

    Every per-token input moves alike: embedded patches, those of VACE's control stream, RoPE
    tables and, where timesteps are given per token (Wan 2.2 TI2V-5B), their projection.
    """

    def patches(module, args, output: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, S)
        order = call.order(output)
        if order is None:
            return output
        tokens = output.flatten(2)
        missing = call.grid.tokens - tokens.shape[2]
        if missing:  # forward would pad a control stream that is too short itself
            tokens = F.pad(tokens, (0, missing))
        return tokens[..., order]

    def rope(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        order = call.order(output[0])
        return output if order is None else tuple(table[:, order] for table in output)

    def timesteps(module, args, output: tuple) -> tuple:  # (temb, projection, text, image)
        order = call.order(output[1])
        if order is None or output[1].ndim < 3:
            return output
        return output[0], output[1][:, order], *output[2:]

    def restore(module, args: tuple[Tensor]) -> tuple[Tensor, ...]:  # (B, S, C)
        return call.restored(args[0]), *args[1:]

    yield transformer.patch_embedding.register_forward_hook(patches).remove
    if hasattr(transformer, "vace_patch_embedding"):
        yield transformer.vace_patch_embedding.register_forward_hook(patches).remove
    yield transformer.rope.register_forward_hook(rope).remove
    yield transformer.condition_embedder.register_forward_hook(timesteps).remove
    yield transformer.norm_out.register_forward_pre_hook(restore).remove


WAN = Family(
    name="Wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    pipelines=(
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "WanVACEPipeline",
        "LucyEditPipeline",
    ),
    guidance="two calls",
    text="in a cross-attention",
    fps=16,
    stock_processor="WanAttnProcessor",
    processor=WanSparseAttnProcessor,
    prepare=prepare,
    self_attentions=self_attentions,
    hooks=hooks,
    tested="`WanPipeline` tiny trained; the rest tiny random",
)
