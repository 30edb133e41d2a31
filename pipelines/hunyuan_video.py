"""HunyuanVideo and HunyuanVideo-1.5: joint attention over [video, text]; padded text is dropped.

Dropping it is exact in mathematics, not in bits: the padded tokens are masked as keys, and what
they attend to reaches no video token. The masked attention of the stock pipelines cannot use
torch's fastest kernels, so this makes dense steps faster, too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ..grid import VideoGrid
from ..step import attend
from .family import CurrentCall, Family, Prepared, Undo
from .rotary import rotate_


class HunyuanVideoSparseAttnProcessor:
    """Attention of dual and single blocks, with the attention itself handed to a layer of ours.

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
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        length = hidden_states.shape[1]
        single = attn.add_q_proj is None  # text shares the projections of the video
        if single:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        joint = []
        for part in ("q", "k", "v"):  # each to its end: what is underway at once sets the peak
            x = project(attn, hidden_states, f"to_{part}", f"norm_{part}")
            if image_rotary_emb is not None and part != "v":
                rotate_(x[:, :length], image_rotary_emb, dim=1)
            if not single:
                text = project(
                    attn, encoder_hidden_states, f"add_{part}_proj", f"norm_added_{part}"
                )
                x = torch.cat([x, text], dim=1)
            joint.append(x)
        query, key, value = joint
        output = attend(query, key, value, self.slot)  # (B, S, H, D)
        output = output.flatten(2, 3).to(query.dtype)
        hidden_states, encoder_hidden_states = output[:, :length], output[:, length:]
        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states

    def dense(self, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None) -> Tensor:
        """The user's own attention backend, masked where texts differ in length."""
        mask = None if kv_len is None else self.mask(_valid(key, kv_len))
        return dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend
        )

    def mask(self, valid: Tensor) -> Tensor:
        """(B, S) bool -> the mask of the stock processor."""
        return valid[:, None, None]


class HunyuanVideo15SparseAttnProcessor(HunyuanVideoSparseAttnProcessor):
    """The stock mask of 1.5 also bars the padded queries."""

    def mask(self, valid: Tensor) -> Tensor:
        return valid[:, None, None] & valid[:, None, :, None]


def project(attn: Any, x: Tensor, projection: str, norm: str) -> Tensor:
    """Query, key or value (B, S, H, D), with its norm where it has one."""
    x = getattr(attn, projection)(x).unflatten(2, (attn.heads, -1))
    normed = getattr(attn, norm, None)
    return x if normed is None else normed(x)


def _valid(key: Tensor, kv_len: Tensor) -> Tensor:
    return torch.arange(key.shape[1], device=key.device) < kv_len[:, None]


def prepare(transformer: Any, given: dict[str, Any], keep_padding: bool) -> Prepared:
    """Text behind the longest prompt of the batch is cut off after the token refiner.

    The stock forward counts the valid tokens and takes as many from the front. One host sync.
    """
    mask = given["encoder_attention_mask"]
    counts = mask.sum(1, dtype=torch.int).tolist()  # the mask may be bfloat16: exact to 256
    slots = mask.shape[1] if keep_padding else max(1, *counts)
    config = transformer.config
    image_channels = config.in_channels > (config.out_channels or config.in_channels)
    first_frame = image_channels or config.image_condition_type == "token_replace"
    grid = _grid(transformer, given, slots, first_frame)
    return Prepared(grid, valid_lengths(grid, counts), latent_patch=_patch(config))


def prepare_15(transformer: Any, given: dict[str, Any], keep_padding: bool) -> Prepared:
    """1.5 joins image, byT5 and prompt tokens in its forward, valid ones first; two host syncs."""
    patch, image = _patch(transformer.config), given["image_embeds"]
    images = image.shape[1] if bool(image.any()) else 0
    masks = {suffix: given[f"encoder_attention_mask{suffix}"].bool() for suffix in ("", "_2")}
    counts = [images + n for n in sum(mask.sum(1) for mask in masks.values()).tolist()]
    if keep_padding:
        slots = image.shape[1] + sum(mask.shape[1] for mask in masks.values())
        grid = _grid(transformer, given, slots, first_frame=images > 0)
        return Prepared(grid, valid_lengths(grid, counts), latent_patch=patch)
    changed = {"image_embeds": image[:, :images]}
    for suffix, mask in masks.items():
        used = mask.any(0)
        used[:1] |= suffix == ""  # the token refiner needs a token
        for name in (f"encoder_hidden_states{suffix}", f"encoder_attention_mask{suffix}"):
            changed[name] = given[name][:, used]
    slots = images + sum(changed[f"encoder_attention_mask{suffix}"].shape[1] for suffix in masks)
    grid = _grid(transformer, given, slots, first_frame=images > 0)
    return Prepared(grid, valid_lengths(grid, counts), changed, latent_patch=patch)


def _patch(config: Any) -> tuple[int, int, int]:
    return config.patch_size_t, config.patch_size, config.patch_size


def _grid(transformer: Any, given: dict[str, Any], slots: int, first_frame: bool) -> VideoGrid:
    """Of a latent video (B, C, T, H, W); `first_frame` is given by an image, not generated."""
    config = transformer.config
    frames, height, width = given["hidden_states"].shape[2:]
    return VideoGrid(
        frames // config.patch_size_t,
        height // config.patch_size,
        width // config.patch_size,
        text_tokens=slots,
        conditioning_frames=int(first_frame),
    )


def valid_lengths(grid: VideoGrid, counts: list[int]) -> tuple[int, ...] | None:
    if min(counts) == grid.text_tokens:
        return None
    return tuple(grid.video_tokens + count for count in counts)


def self_attentions(transformer: Any) -> Iterator[nn.Module]:
    """The token refiner's attention, below `context_embedder`, is left alone."""
    for block in transformer.transformer_blocks:
        yield block.attn
    for block in getattr(transformer, "single_transformer_blocks", ()):
        yield block.attn


def hooks(transformer: Any, call: CurrentCall) -> Iterator[Undo]:
    """Block order behind RoPE, raster order before the output norm.

    The latent video comes in block order already: the patch embedding is among the blocks that
    `compile_repeated_blocks` compiles, and a hook on it would break its graph. Where several
    processes share the call, there is one, since latents cannot be split by tokens.
    """

    def patches(module, args, output: Tensor) -> Tensor:  # (B, S, C)
        return output[:, call.order(output)]

    def rope(module, args, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:  # (S, D) each
        order = call.order(output[0])
        return output if order is None else tuple(table[order] for table in output)

    def restore(module, args: tuple) -> tuple:
        return call.restored(args[0]), *args[1:]

    if call.split:
        yield transformer.x_embedder.register_forward_hook(patches).remove
    yield transformer.rope.register_forward_hook(rope).remove
    yield transformer.norm_out.register_forward_pre_hook(restore).remove


def hooks_with_cut(transformer: Any, call: CurrentCall) -> Iterator[Undo]:
    """`hooks`, the cut of the text behind the token refiner, and where the blocks modulate the
    tokens of a given first frame by themselves, how many of these this process holds."""

    def cut(module, args, output: Tensor) -> Tensor:  # (B, text, C)
        # A copy has the strides that later blocks get, so that one graph serves all of them.
        return output[:, : call.grid.text_tokens].clone(memory_format=torch.contiguous_format)

    def first_frame(module, args: tuple) -> tuple:  # the last argument is its number of tokens
        return *args[:-1], call.first_of(args[-1])

    yield from hooks(transformer, call)
    if call.split and transformer.config.image_condition_type == "token_replace":
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            yield block.register_forward_pre_hook(first_frame).remove
    yield transformer.context_embedder.register_forward_hook(cut).remove


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    transformers=("HunyuanVideoTransformer3DModel",),
    pipelines=(
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    ),
    guidance="embedded, or two calls",
    text="after the video",
    fps=24,
    tested="`HunyuanVideoPipeline` tiny trained; the rest tiny random",
    stock_processor="HunyuanVideoAttnProcessor2_0",
    processor=HunyuanVideoSparseAttnProcessor,
    prepare=prepare,
    self_attentions=self_attentions,
    hooks=hooks_with_cut,
)
HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo-1.5",
    transformers=("HunyuanVideo15Transformer3DModel",),
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    guidance="two calls",
    text="after the video",
    fps=24,
    stock_processor="HunyuanVideo15AttnProcessor2_0",
    processor=HunyuanVideo15SparseAttnProcessor,
    prepare=prepare_15,
    self_attentions=self_attentions,
    hooks=hooks,
)
