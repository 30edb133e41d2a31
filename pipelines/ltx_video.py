"""LTX-Video: video-only self-attention in `attn1`, text in a cross-attention, batched CFG.

Tokens arrive packed, (B, S, C), and RoPE turns the whole width of a token, before it is cut into
heads.
"""

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch import Tensor, nn

from ..grid import VideoGrid
from ..step import attend
from .family import CurrentCall, Family, Prepared, Undo


class LTXVideoSparseAttnProcessor:
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
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("this processor is for self-attention without a mask")
        # the stock processor does not look at fused projections either
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states))
        )
        output = attend(query, key, value, self.slot)  # (B, S, H, D)
        output = output.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](output))

    def dense(self, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None) -> Tensor:
        """The user's own attention backend."""
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)


def prepare(transformer: Any, given: dict[str, Any], keep_padding: bool) -> Prepared:
    """Sizes come as arguments, in tokens. One host sync for image-to-video, none for text."""
    sizes: list[Any] = [given.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes or given.get("video_coords") is not None:
        raise ValueError(
            "sparse attention for LTX-Video needs one grid of tokens, and this call places them by"
            " video_coords, with conditions between them: use LTXPipeline or"
            " LTXImageToVideoPipeline, or disable sparse attention"
        )
    frames, height, width = sizes
    timestep, leading = given["timestep"], 0
    if timestep.ndim == 2 and timestep.shape[1] > 1:  # (B, S), 0 at tokens that are given
        known = ~timestep.unflatten(1, (frames, -1)).any(2).any(0)
        leading = int(known.long().cumprod(0).sum())
    return Prepared(VideoGrid(frames, height, width, conditioning_frames=leading))


def self_attentions(transformer: Any) -> Iterator[nn.Module]:
    for block in transformer.transformer_blocks:
        yield block.attn1


def hooks(transformer: Any, call: CurrentCall) -> Iterator[Undo]:
    """Block order behind the input projection, raster order before the output norm.

    RoPE tables move alike, and the projection of timesteps where they are given per token; its
    second output modulates behind the output norm, in raster order.
    """

    def tokens(module, args, output: Tensor) -> Tensor:  # (B, S, C)
        order = call.order(output)
        return output if order is None else output[:, order]

    def rope(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        order = call.order(output[0])
        return output if order is None else tuple(table[:, order] for table in output)

    def timesteps(module, args, kwargs: dict, output: tuple[Tensor, Tensor]) -> tuple:
        order, each = call.order(output[0]), output[0].unflatten(0, (kwargs["batch_size"], -1))
        if order is None or each.shape[1] == 1:
            return output
        return each[:, order].flatten(0, 1), output[1]

    def restore(module, args: tuple[Tensor]) -> tuple[Tensor, ...]:  # (B, S, C)
        return call.restored(args[0]), *args[1:]

    yield transformer.proj_in.register_forward_hook(tokens).remove
    yield transformer.rope.register_forward_hook(rope).remove
    yield transformer.time_embed.register_forward_hook(timesteps, with_kwargs=True).remove
    yield transformer.norm_out.register_forward_pre_hook(restore).remove


LTX_VIDEO = Family(
    name="LTX-Video",
    transformers=("LTXVideoTransformer3DModel",),
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline"),
    guidance="one batch",
    text="in a cross-attention",
    fps=25,
    stock_processor="LTXVideoAttnProcessor",
    processor=LTXVideoSparseAttnProcessor,
    prepare=prepare,
    self_attentions=self_attentions,
    hooks=hooks,
)
