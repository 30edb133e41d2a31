"""Train a tiny text-to-video CogVideoX pipeline on drawn clips: its parts and sizes.

    torchrun --nproc-per-node 2 samples/train_cogvideox.py --stage vae,transformer,save

What the stages do: train_main.py. As in the published models, v-prediction on a noise schedule that
ends in pure noise, 226 text slots that are all attended, and guidance by a batch of two halves.
"""

import sys
from functools import cache
from types import SimpleNamespace

import torch
import train_main
import train_models as parts
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from transformers import T5Config, T5EncoderModel

NAME = "cogvideox_tiny"
PIPELINE, TRANSFORMER, VAE = CogVideoXPipeline, CogVideoXTransformer3DModel, AutoencoderKLCogVideoX
TEXT_ENCODER = T5EncoderModel
TEXT_SLOTS = 226
FIRST_WORD = 0
LAYERS = 7
CALL = {
    "height": 128,
    "width": 128,
    "num_frames": 17,
    "num_inference_steps": 25,
    "guidance_scale": 3.0,
}
SMOKE_CALL = {"height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 2}


# ---------------------------------------------------------------------------------- noise levels


def build_scheduler():
    """CogVideoX-2B's schedule, moved further towards noise: neighbouring frames tell so much."""
    return CogVideoXDDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=6.0,
    )


@cache
def alpha_bars(device):
    return build_scheduler().alphas_cumprod.float().to(device)  # (1000,)


def levels(time):
    """v-prediction at `time` (B,) in [0, 1)."""
    step = (time * 1000).long().clamp(0, 999)
    kept = alpha_bars(time.device)[step]
    keep, add = kept.sqrt(), (1 - kept).sqrt()
    return parts.Levels(keep, add, keep, add, step)


def draw_times(count, shift, device):
    """The sampler's own density: the schedule is shifted already."""
    return torch.rand(count, device=device)


# ---------------------------------------------------------------------------------- autoencoder


def build_vae():
    """Autoencoder without temporal compression: 4x4 pixels of a frame become 8 numbers."""
    return AutoencoderKLCogVideoX(
        latent_channels=parts.LATENT_CHANNELS,
        down_block_types=["CogVideoXDownBlock3D"] * 3,
        up_block_types=["CogVideoXUpBlock3D"] * 3,
        block_out_channels=[16, 32, 32],
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=1,
        sample_height=1024,  # tiling is off below half of it
        sample_width=1024,
    )


def convolve(module, x, conv_cache=None):
    conv, padding = module.conv, (module.height_pad, module.width_pad)
    return parts.convolve_frames(x, conv.weight, conv.bias, conv.stride[1:], padding), None


PATCHES = {CogVideoXCausalConv3d: convolve}


def encode(vae, video):
    """Mean and log variance (B, 8, T, h, w) of video (B, 3, T, H, W), inside `per_frame`."""
    return vae.encoder(video)[0].float().chunk(2, dim=1)


def decode(vae, latents):
    return vae.decoder(latents)[0].float()


latent_statistics, set_statistics = parts.scalar_statistics, parts.set_scalar


# ----------------------------------------------------------------------------------------- text


def build_tokenizer():
    return parts.build_tokenizer(TEXT_SLOTS)


def tokenize(tokenizer, captions):
    return parts.tokenize(tokenizer, captions, TEXT_SLOTS)


def build_text_encoder(vocab_size):
    config = T5Config(
        vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=192, num_layers=2, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config)


def embed_text(text_encoder, ids):
    """Prompt embeddings (B, 226, 128); padding is attended, as in CogVideoXPipeline."""
    return text_encoder(ids)[0]


# ---------------------------------------------------------------------------------- transformer


def build_transformer(layers):
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=parts.LATENT_CHANNELS,
        out_channels=parts.LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=128,
        num_layers=layers,
        sample_width=32,
        sample_height=32,
        sample_frames=17,
        patch_size=2,
        temporal_compression_ratio=1,
        max_text_seq_length=TEXT_SLOTS,
        use_rotary_positional_embeddings=True,
    )
    parts.zero_modulation(transformer)
    return transformer


def blocks(transformer):
    return list(transformer.transformer_blocks)


def text_projection(transformer):
    return transformer.patch_embed.text_proj


@cache
def rotary(config, frames, height, width, device):
    """The pipeline's own tables for latents of this size."""
    pipe = SimpleNamespace(
        vae_scale_factor_spatial=4,
        transformer=SimpleNamespace(config=SimpleNamespace(**dict(config))),
    )
    prepare = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(pipe, 4 * height, 4 * width, frames, device)


def predict(transformer, noisy, timestep, text, ids, guidance=None):
    """v (B, 8, T, h, w)."""
    names = "attention_head_dim", "patch_size", "patch_size_t", "sample_height", "sample_width"
    config = tuple((name, transformer.config[name]) for name in names)
    table = rotary(config, *noisy.shape[2:], noisy.device)
    video = noisy.transpose(1, 2)  # (B, T, 8, h, w)
    return transformer(
        video, text, timestep, image_rotary_emb=table, return_dict=False
    )[0].transpose(1, 2)  # fmt: skip


def assemble(vae, text_encoder, transformer):
    return CogVideoXPipeline(
        tokenizer=build_tokenizer(), text_encoder=text_encoder, vae=vae,
        transformer=transformer, scheduler=build_scheduler(),
    )  # fmt: skip


if __name__ == "__main__":
    train_main.main(sys.modules[__name__])
