"""A tiny LTX-Video transformer and its pipelines with random weights, built offline.

Prompts are given as embeddings, so that no text encoder is needed. 33 frames of 160 x 224 become
5 x 5 x 7 tokens.
"""

import diffusers
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
)
from PIL import Image

SIZE = {"height": 160, "width": 224, "num_frames": 33}
IMAGE = Image.linear_gradient("L").convert("RGB").resize((224, 160))


def ltx_video() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    ).eval()


def ltx_vae() -> AutoencoderKLLTXVideo:
    """As deep as the published one, which sets the compression: 32 in space, 8 in time."""
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()


def ltx_pipeline(name: str):
    torch.manual_seed(0)
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=ltx_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=ltx_video(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ltx_call(batch: int, guided: bool, image: bool = False) -> dict:
    """Arguments of a pipeline, prompts of different length."""
    call = SIZE | {"guidance_scale": 3.0 if guided else 1.0}
    for prefix in ("", "negative_") if guided else ("",):
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, 12, 16)
        call[f"{prefix}prompt_attention_mask"] = (torch.arange(12) < 9).long().repeat(batch, 1)
    return call | ({"image": IMAGE} if image else {})
