"""Video transformers at their real size with random weights, and inputs for one forward.

Nothing is downloaded: modules are built from their config with parameters on the meta device, which
are then made on the GPU in bfloat16, float32 where diffusers keeps them so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """A model and a size of video.

    Attributes:
        config: of the transformer, but for its numbers of layers.
        layers: how many there are in each list of blocks: (attribute, option, number).
        inputs: (device, dtype) -> keyword arguments of one forward.
        measured: layers of each list that are built unless told otherwise.
        branches: calls of the transformer in one denoising step with guidance.
    """

    name: str
    cls: type
    config: dict[str, Any]
    layers: tuple[tuple[str, str, int], ...]
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]
    measured: tuple[int, ...]
    branches: tuple[str, ...]

    @property
    def block_lists(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.layers)


class UnmaskedHunyuanVideo(HunyuanVideoAttnProcessor2_0):
    """The stock processor for text without padding: it needs no mask, which slows attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


def _wan(name: str, heads: int, layers: int, ffn: int, latent: tuple, measured: int) -> Model:
    def inputs(device, dtype):
        return {
            "hidden_states": torch.randn(1, 16, *latent, device=device, dtype=dtype),
            "timestep": torch.tensor([500], device=device),
            "encoder_hidden_states": torch.randn(1, 512, 4096, device=device, dtype=dtype),
        }

    config = {"num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn}
    config |= {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
    config |= {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
    blocks = (("blocks", "num_layers", layers),)
    branches = "cond", "uncond"
    return Model(name, WanTransformer3DModel, config, blocks, inputs, (measured,), branches)


def _hunyuan_inputs(latent: tuple, text: tuple[int, int], pooled: int) -> Callable:
    def inputs(device, dtype):
        return {
            "hidden_states": torch.randn(1, *latent, device=device, dtype=dtype),
            "timestep": torch.tensor([500], device=device),
            "encoder_hidden_states": torch.randn(1, *text, device=device, dtype=dtype),
            "encoder_attention_mask": torch.ones(1, text[0], device=device, dtype=dtype),
            "pooled_projections": torch.randn(1, pooled, device=device, dtype=dtype),
            "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
        }

    return inputs


def _cogvideox_inputs(latent: tuple, text: tuple[int, int], head_dim: int) -> Callable:
    def inputs(device, dtype):
        frames, _, height, width = latent
        grid = height // 2, width // 2
        rope = get_3d_rotary_pos_embed(head_dim, ((0, 0), grid), grid, frames, device=device)
        return {
            "hidden_states": torch.randn(2, *latent, device=device, dtype=dtype),
            "timestep": torch.tensor([500, 500], device=device),
            "encoder_hidden_states": torch.randn(2, *text, device=device, dtype=dtype),
            "image_rotary_emb": rope,
        }

    return inputs


HUNYUAN_LISTS = (("transformer_blocks", 20), ("single_transformer_blocks", 40))
HUNYUAN_OPTIONS = ("num_layers", "num_single_layers")

MODELS = {
    model.name: model
    for model in (
        _wan("wan-1.3b-480p", 12, 30, 8960, (21, 60, 104), measured=30),
        _wan("wan-14b-720p", 40, 40, 13824, (21, 90, 160), measured=4),
        Model(
            name="hunyuanvideo-720p",
            cls=HunyuanVideoTransformer3DModel,
            config={"in_channels": 16, "out_channels": 16, "guidance_embeds": True},
            layers=tuple((n, o, k) for (n, k), o in zip(HUNYUAN_LISTS, HUNYUAN_OPTIONS)),
            # a prompt of 60 tokens: the padding up to 256 is dropped on the dense side, too
            inputs=_hunyuan_inputs((16, 33, 90, 160), text=(60, 4096), pooled=768),
            measured=(2, 2),
            branches=("cond",),  # guidance is embedded
        ),
        Model(
            name="cogvideox-5b-480p",
            cls=CogVideoXTransformer3DModel,
            config={
                "num_attention_heads": 48,
                "attention_head_dim": 64,
                "use_rotary_positional_embeddings": True,
            },
            layers=(("transformer_blocks", "num_layers", 42),),
            inputs=_cogvideox_inputs((13, 16, 60, 90), text=(226, 4096), head_dim=64),
            measured=(10,),
            branches=("cond_uncond",),  # one batch of two
        ),
    )
}


def tiny(model: Model) -> Model:
    """The same family at a few hundred tokens and four layers a list, half of them measured."""
    if model.cls is WanTransformer3DModel:
        heads = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}
        config = model.config | heads | {"text_dim": 32, "freq_dim": 64}

        def inputs(device, dtype):
            return {
                "hidden_states": torch.randn(1, 16, 5, 14, 18, device=device, dtype=dtype),
                "timestep": torch.tensor([500], device=device),
                "encoder_hidden_states": torch.randn(1, 16, 32, device=device, dtype=dtype),
            }

    elif model.cls is HunyuanVideoTransformer3DModel:
        config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2}
        config |= {"attention_head_dim": 16, "num_refiner_layers": 1, "text_embed_dim": 16}
        config |= {"pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6), "guidance_embeds": True}
        inputs = _hunyuan_inputs((4, 5, 14, 18), text=(6, 16), pooled=8)
    else:
        config = {"num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 4}
        config |= {"out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 32}
        config |= {"sample_width": 18, "sample_height": 14, "sample_frames": 17}
        config |= {"max_text_seq_length": 6, "use_rotary_positional_embeddings": True}
        inputs = _cogvideox_inputs((5, 4, 14, 18), text=(6, 32), head_dim=64)
    layers = tuple((name, option, 4) for name, option, _ in model.layers)
    measured = (2,) * len(layers)
    return replace(model, config=config, layers=layers, inputs=inputs, measured=measured)


def build(model: Model, layers: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer with so many layers in each list of blocks."""
    options = {option: number for (_, option, _), number in zip(model.layers, layers)}
    with init_empty_weights(include_buffers=False):
        transformer: Any = model.cls(**model.config, **options)
    in_float32 = transformer._keep_in_fp32_modules or []
    generator = torch.Generator(device).manual_seed(0)
    for prefix, module in transformer.named_modules():
        for name, empty in module.named_parameters(recurse=False):
            float32 = any(part in in_float32 for part in [*prefix.split("."), name])
            place = {"device": device, "dtype": torch.float32 if float32 else dtype}
            value = torch.empty(empty.shape, **place)
            if empty.ndim == 1:  # of a norm, or a bias
                value.fill_(name == "weight")
            else:
                value.normal_(std=0.02, generator=generator)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return transformer.eval()
