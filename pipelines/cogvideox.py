"""CogVideoX 1.0 and 1.5: joint attention over [text, video], padded text attended, batched CFG."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import VideoGrid
from ..step import attend
from .family import CurrentCall, Family, Prepared, Undo
from .rotary import rotate_

FUSED = "FusedCogVideoXAttnProcessor2_0"


class CogVideoXSparseAttnProcessor:
    """The stock processor, fused projections or not, with the attention handed to a layer of ours.

    Args:
        slot: 0-d int64 CPU tensor that names the layer.
    """

    before: Any  # the processor it stands for

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
        if attention_mask is not None:
            raise ValueError("CogVideoX attends without a mask; this one got an attention_mask")
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in self._projections(attn, joint)
        )  # (B, H, S, D)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            for x in (query, key):
                rotate_(x[:, :, text:], image_rotary_emb, dim=2)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = attend(query, key, value, self.slot).flatten(2, 3)  # (B, S, H * D)
        output = attn.to_out[1](attn.to_out[0](output))
        return output[:, text:], output[:, :text]

    def _projections(self, attn: Any, x: Tensor) -> tuple[Tensor, ...]:
        """As the stock processor would: unfusing leaves the module's fused weights behind."""
        if type(self.before).__name__ == FUSED:
            return attn.to_qkv(x).chunk(3, dim=-1)
        return attn.to_q(x), attn.to_k(x), attn.to_v(x)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None) -> Tensor:
        """torch's own choice: diffusers gives CogVideoX no attention backends."""
        return torch_attention(query, key, value)


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of (B, S, H, D) tensors, by the kernel that torch takes by itself."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def prepare(transformer: Any, given: dict[str, Any], keep_padding: bool) -> Prepared:
    """The latent video is (B, T, C, H, W); RoPE tables are made by the pipeline."""
    config = transformer.config
    frames, _, height, width = given["hidden_states"].shape[1:]
    grid = VideoGrid(
        -(-frames // (config.patch_size_t or 1)),
        height // config.patch_size,
        width // config.patch_size,
        text_tokens=given["encoder_hidden_states"].shape[1],
        text_first=True,
        conditioning_frames=int(_starts_from_image(config, given["hidden_states"])),
    )
    return Prepared(grid, per_token=("image_rotary_emb",))


def _starts_from_image(config: Any, latents: Tensor) -> bool:
    """True where the extra channels hold an image in the first frame and zeros behind it.

    They hold a whole video for `CogVideoXFunControlPipeline`. One host sync where they exist.
    """
    extra = latents[:, -1, config.out_channels or config.in_channels :]
    return extra.numel() > 0 and not bool(extra.any())


def self_attentions(transformer: Any) -> Iterator[nn.Module]:
    for block in transformer.transformer_blocks:
        yield block.attn1


def hooks(transformer: Any, call: CurrentCall) -> Iterator[Undo]:
    """Block order behind the patch embedding, raster order before the output norm."""

    def patches(module, args, output: Tensor) -> Tensor:  # (B, text + S, C)
        order, text = call.order(output), call.grid.text_tokens
        if order is None:
            return output
        return torch.cat([output[:, :text], output[:, text:][:, order]], dim=1)

    def restore(module, args: tuple[Tensor], kwargs: dict) -> tuple[tuple, dict]:
        return (call.restored(args[0]), *args[1:]), kwargs

    yield transformer.patch_embed.register_forward_hook(patches).remove
    yield transformer.norm_out.register_forward_pre_hook(restore, with_kwargs=True).remove


COGVIDEOX = Family(
    name="CogVideoX",
    transformers=("CogVideoXTransformer3DModel",),
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    guidance="one batch",
    text="before the video",
    fps=8,
    tested="`CogVideoXPipeline` tiny trained; the rest tiny random",
    stock_processor="CogVideoXAttnProcessor2_0",
    fused_processor=FUSED,
    processor=CogVideoXSparseAttnProcessor,
    prepare=prepare,
    self_attentions=self_attentions,
    hooks=hooks,
)
