"""HunyuanVideoPipeline and CogVideoXPipeline end to end on random weights, by prompt embeddings."""

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
)
from test_joint import cogvideox, hunyuan

from dit_sparse import enable_sparse_attention


def hunyuan_pipeline():
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=hunyuan().eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    call = {
        "prompt_embeds": torch.randn(1, 20, 16),
        "pooled_prompt_embeds": torch.randn(1, 8),
        "prompt_attention_mask": (torch.arange(20) < 9).long()[None],
        "num_frames": 9,
    }
    negative = {
        "negative_prompt_embeds": torch.randn(1, 20, 16),
        "negative_pooled_prompt_embeds": torch.randn(1, 8),
        "negative_prompt_attention_mask": (torch.arange(20) < 4).long()[None],
        "true_cfg_scale": 3.0,
    }
    return pipe, call, negative


def cogvideox_pipeline():
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=cogvideox().eval(),
        vae=vae.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )
    call = {"prompt_embeds": torch.randn(1, 16, 32), "num_frames": 13}
    call |= {"negative_prompt_embeds": torch.randn(1, 16, 32), "guidance_scale": 1.0}
    return pipe, call, {"guidance_scale": 4.0}


@torch.no_grad()
def latents(pipe, call):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **call,
        height=96,
        width=112,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("make", [hunyuan_pipeline, cogvideox_pipeline])
def test_exact_then_sparse_then_undone(make, guided):
    pipe, call, guidance = make()
    call |= guidance if guided else {}
    stock = latents(pipe, call)
    handle = enable_sparse_attention(pipe, density=1.0, keep_padding=True)
    assert latents(pipe, call).equal(stock) and handle.report().effective_cost == 1
    handle = enable_sparse_attention(pipe, density=0.99, block_size=32)
    assert (latents(pipe, call) - stock).abs().max() < 1e-4
    handle = enable_sparse_attention(pipe, density=0.4, block_size=32)
    sparse = latents(pipe, call)
    assert latents(pipe, call).equal(sparse) and (sparse - stock).abs().max() > 1e-4
    report = handle.report()
    assert report.steps == 4 and report.search_calls and report.reuse_calls
    branches = {entry["branch"] for entry in report.trace}
    if make is cogvideox_pipeline:
        assert branches == {"cond_uncond"}
    else:
        assert branches == ({"cond", "uncond"} if guided else {"cond"})
    handle.disable()
    assert latents(pipe, call).equal(stock)


def test_two_videos_per_prompt():
    pipe, call, _ = hunyuan_pipeline()
    enable_sparse_attention(pipe, density=0.4, block_size=32)
    assert latents(pipe, call | {"num_videos_per_prompt": 2}).shape[0] == 2
