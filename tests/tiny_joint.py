"""Tiny HunyuanVideo, CogVideoX and Mochi transformers and pipelines, random weights, built offline.

Prompts are given as embeddings, so that no text encoder is needed. 33 frames become odd grids of
9 x 5 x 7 tokens, 5 x 5 x 7 for CogVideoX 1.5.
"""

from functools import partial

import diffusers
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMochi,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    MochiTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

SIZE = {"height": 80, "width": 112}
HALF_SIZE = {"height": 40, "width": 56}  # for a CogVideoX VAE of one level less
IMAGE = Image.linear_gradient("L").convert("RGB").resize((112, 80))


def hunyuan(head_dim=16, **options):
    return HunyuanVideoTransformer3DModel(
        **{"in_channels": 4, "out_channels": 4, "patch_size": 1} | options,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8),
    ).eval()


def hunyuan_15(task="t2v"):
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=96,
        task_type=task,
    ).eval()


def cogvideox(**options):
    return CogVideoXTransformer3DModel(
        **{"in_channels": 4} | options,
        num_attention_heads=2,
        attention_head_dim=64,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=14,
        sample_height=12,
        sample_frames=33,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    ).eval()


def mochi():
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=8,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=8,
    )
    for name, weight in transformer.named_parameters():  # made as 0, which turns no token, and 1
        if name == "pos_frequencies" or ".norm_" in name:
            torch.nn.init.normal_(weight)
    return transformer.eval()


cogvideox_15 = partial(cogvideox, patch_size_t=2, patch_bias=False)


def hunyuan_vae():
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    ).eval()


def cogvideox_vae():
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()


def mochi_vae():
    """With the 12 latent channels and the compression that the pipeline takes for granted."""
    return AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()


def hunyuan_pipeline(name, **options):
    torch.manual_seed(0)
    parts = {"vae": hunyuan_vae(), "transformer": hunyuan(patch_size=2, **options)}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return build(name, parts)


def hunyuan_prompts(batch=1, prefix="", valid=9):
    return {
        f"{prefix}prompt_embeds": torch.randn(batch, 20, 16),
        f"{'negative_' if prefix else ''}pooled_prompt_embeds": torch.randn(batch, 8),
        f"{prefix}prompt_attention_mask": (torch.arange(20) < valid).long().repeat(batch, 1),
    }


def hunyuan_call(batch, guided):
    call = {"num_frames": 33, **SIZE} | hunyuan_prompts(batch)
    if guided:
        call |= hunyuan_prompts(batch, "negative_", valid=4) | {"true_cfg_scale": 3.0}
    return call


def hunyuan_image_call(batch, guided):
    image = torch.rand(batch, 3, 80, 112, generator=torch.Generator().manual_seed(1))
    return hunyuan_call(batch, guided) | {"image": image}


def hunyuan_15_pipeline(name, task="t2v"):
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(32,) * 5,
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    parts = {"vae": vae.eval(), "transformer": hunyuan_15(task)}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts["guider"] = ClassifierFreeGuidance(guidance_scale=3.0)
    if task == "i2v":
        config = SiglipVisionConfig(
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        parts["image_encoder"] = SiglipVisionModel(config).eval()
        parts["feature_extractor"] = SiglipImageProcessor(size={"height": 16, "width": 16})
    pipe = build(name, parts)
    pipe.vision_num_semantic_tokens = 5  # slots for an image, empty without one
    return pipe


def hunyuan_15_prompts(batch, prefix="", valid=9, valid_2=3):
    return {
        f"{prefix}prompt_embeds": torch.randn(batch, 20, 16),
        f"{prefix}prompt_embeds_mask": (torch.arange(20) < valid).repeat(batch, 1),
        f"{prefix}prompt_embeds_2": torch.randn(batch, 6, 8),
        f"{prefix}prompt_embeds_mask_2": (torch.arange(6) < valid_2).repeat(batch, 1),
    }


def hunyuan_15_call(batch, guided):
    call = {"num_frames": 33, **SIZE} | hunyuan_15_prompts(batch)
    return call | hunyuan_15_prompts(batch, "negative_", 4, 0)


def hunyuan_15_image_call(batch, guided):
    call = hunyuan_15_call(batch, guided) | {"image": IMAGE}
    return {name: value for name, value in call.items() if name not in SIZE}


def cogvideox_pipeline(name, make=cogvideox, **options):
    torch.manual_seed(0)
    parts = {"vae": cogvideox_vae(), "transformer": make(**options)}
    return build(name, parts | {"scheduler": CogVideoXDDIMScheduler()})


def cogvideox_call(batch, guided):
    return {
        "prompt_embeds": torch.randn(batch, 16, 32),
        "negative_prompt_embeds": torch.randn(batch, 16, 32),
        "guidance_scale": 4.0 if guided else 1.0,
        "num_frames": 33,
        **HALF_SIZE,
    }


def cogvideox_image_call(batch, guided):
    image = torch.rand(batch, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    return cogvideox_call(batch, guided) | {"image": image}


def cogvideox_control_call(batch, guided):
    call = cogvideox_call(batch, guided)
    del call["num_frames"]
    generator = torch.Generator().manual_seed(1)
    return call | {"control_video": torch.rand(batch, 33, 3, 40, 56, generator=generator)}


def cogvideox_video_call(batch, guided):
    """The last 4 of 5 steps."""
    call = cogvideox_control_call(batch, guided)
    return call | {"video": call.pop("control_video"), "strength": 0.8, "num_inference_steps": 5}


def mochi_pipeline():
    torch.manual_seed(0)
    parts = {"vae": mochi_vae(), "transformer": mochi()}
    return build("MochiPipeline", parts | {"scheduler": FlowMatchEulerDiscreteScheduler()})


def mochi_call(batch, guided):
    """Prompts that differ in length, from the negative ones too."""
    call = {"num_frames": 49, "guidance_scale": 4.5 if guided else 1.0, **SIZE}
    for prefix, valid in (("", 9), ("negative_", 2)) if guided else (("", 9),):
        valid = torch.arange(valid, valid + 5 * batch, 5)
        call[f"{prefix}prompt_embeds"] = torch.randn(batch, 20, 16)
        call[f"{prefix}prompt_attention_mask"] = torch.arange(20) < valid[:, None]
    return call


def set_guidance(pipe, guided):
    """HunyuanVideo-1.5 has its scale in a component."""
    if hasattr(pipe, "guider"):
        pipe.guider.guidance_scale = 3.0 if guided else 1.0


def build(name, parts):
    """The pipeline class of that name, with None for the components that are not given."""
    cls = getattr(diffusers, name)
    wanted = set(cls._get_signature_types()) - {"self"}  # diffusers 0.36 lists it too
    pipe = cls(**dict.fromkeys(wanted) | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CONCATENATED = {"in_channels": 9, "image_condition_type": "latent_concat"}
REPLACED = {"image_condition_type": "token_replace"}

# Name of the case: how to build the pipeline, and its arguments (batch, guided).
PIPELINES = {
    "HunyuanVideo": (partial(hunyuan_pipeline, "HunyuanVideoPipeline"), hunyuan_call),
    "HunyuanVideo I2V, concatenated": (
        partial(hunyuan_pipeline, "HunyuanVideoImageToVideoPipeline", **CONCATENATED),
        hunyuan_image_call,
    ),
    "HunyuanVideo I2V, replaced": (
        partial(hunyuan_pipeline, "HunyuanVideoImageToVideoPipeline", **REPLACED),
        hunyuan_image_call,
    ),
    "SkyReels I2V": (
        partial(hunyuan_pipeline, "HunyuanSkyreelsImageToVideoPipeline", in_channels=8),
        hunyuan_image_call,
    ),
    "HunyuanVideo-1.5": (partial(hunyuan_15_pipeline, "HunyuanVideo15Pipeline"), hunyuan_15_call),
    "HunyuanVideo-1.5 I2V": (
        partial(hunyuan_15_pipeline, "HunyuanVideo15ImageToVideoPipeline", "i2v"),
        hunyuan_15_image_call,
    ),
    "CogVideoX": (partial(cogvideox_pipeline, "CogVideoXPipeline"), cogvideox_call),
    "CogVideoX 1.5": (
        partial(cogvideox_pipeline, "CogVideoXPipeline", cogvideox_15),
        cogvideox_call,
    ),
    "CogVideoX I2V": (
        partial(cogvideox_pipeline, "CogVideoXImageToVideoPipeline", in_channels=8),
        cogvideox_image_call,
    ),
    "CogVideoX 1.5 I2V": (
        partial(
            cogvideox_pipeline,
            "CogVideoXImageToVideoPipeline",
            cogvideox_15,
            in_channels=8,
            ofs_embed_dim=8,
        ),
        cogvideox_image_call,
    ),
    "CogVideoX V2V": (
        partial(cogvideox_pipeline, "CogVideoXVideoToVideoPipeline"),
        cogvideox_video_call,
    ),
    "CogVideoX control": (
        partial(cogvideox_pipeline, "CogVideoXFunControlPipeline", in_channels=8),
        cogvideox_control_call,
    ),
    "Mochi": (mochi_pipeline, mochi_call),
}
