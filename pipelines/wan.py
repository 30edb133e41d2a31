"""Wan 2.1 and 2.2: video-only self-attention in `attn1`, text in a cross-attention of its own."""

from collections.abc import Iterator
from typing import Any

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
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
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
    """The latent video is (B, C, T, H, W); no text in self-attention."""
    latents = given["hidden_states"].shape[2:]
    return Prepared(VideoGrid(*(n // p for n, p in zip(latents, transformer.config.patch_size))))


def self_attentions(transformer: Any) -> Iterator[nn.Module]:
    for block in transformer.blocks:
        yield block.attn1


def hooks(transformer: Any, call: CurrentCall) -> Iterator[Undo]:
    """Hooks that put the tokens in block order once a call, and back before the output norm.

    Every per-token input moves alike: embedded patches, RoPE tables and, where timesteps are given
    per token (Wan 2.2 TI2V-5B), their projection.
    """

    def patches(module, args, output: Tensor) -> Tensor:  # (B, C, T, H, W)
        order = call.order(output)
        return output if order is None else output.flatten(2)[..., order[0]].view(output.shape)

    def rope(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        order = call.order(output[0])
        return output if order is None else tuple(table[:, order[0]] for table in output)

    def timesteps(module, args, output: tuple) -> tuple:  # (temb, projection, text, image)
        order = call.order(output[1])
        if order is None or output[1].ndim < 3:
            return output
        return output[0], output[1][:, order[0]], *output[2:]

    def restore(module, args: tuple[Tensor]) -> tuple[Tensor, ...]:  # (B, S, C)
        order = call.order(args[0])
        return args if order is None else (args[0][:, order[1]], *args[1:])

    yield transformer.patch_embedding.register_forward_hook(patches).remove
    yield transformer.rope.register_forward_hook(rope).remove
    yield transformer.condition_embedder.register_forward_hook(timesteps).remove
    yield transformer.norm_out.register_forward_pre_hook(restore).remove


WAN = Family(
    name="Wan",
    transformers=("WanTransformer3DModel",),
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    guidance="two calls",
    fps=16,
    stock_processor="WanAttnProcessor",
    processor=WanSparseAttnProcessor,
    prepare=prepare,
    self_attentions=self_attentions,
    hooks=hooks,
)
