"""Train a tiny text-to-video Wan pipeline on drawn clips: its parts and sizes.

    python samples/train_wan.py --stage vae,checker,transformer,save --seconds 540
    python samples/train_wan.py --stage transformer,save --seconds 500 --final
    torchrun --nproc-per-node 2 samples/train_wan.py --stage transformer,save \\
        --init samples/wan_tiny

What the stages do: train_main.py.
"""

import sys

import torch
import torch.nn.functional as F
import train_main
import train_models as parts
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from transformers import UMT5Config, UMT5EncoderModel

NAME = "wan_tiny"
PIPELINE, TRANSFORMER, VAE = WanPipeline, WanTransformer3DModel, AutoencoderKLWan
TEXT_ENCODER = UMT5EncoderModel
TEXT_SLOTS = 512  # what WanPipeline pads every prompt to
FIRST_WORD = 0
LAYERS = 6
CALL = {
    "height": 128,
    "width": 128,
    "num_frames": 16,  # WanPipeline returns 17: its temporal factor is 1
    "num_inference_steps": 25,
    "guidance_scale": 3.0,
}
SMOKE_CALL = {"height": 32, "width": 32, "num_frames": 2, "num_inference_steps": 2}

draw_times, levels = parts.flow_times, parts.flow_levels


# ---------------------------------------------------------------------------------- autoencoder


def build_vae():
    """Autoencoder without temporal compression: 4x4 pixels of a frame become 8 numbers."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=parts.LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        scale_factor_temporal=1,
        scale_factor_spatial=4,
        latents_mean=[0.0] * parts.LATENT_CHANNELS,
        latents_std=[1.0] * parts.LATENT_CHANNELS,
    )


def convolve(conv, x, cache_x=None):
    padding = conv._padding[2], conv._padding[0]
    return parts.convolve_frames(x, conv.weight, conv.bias, conv.stride[1:], padding)


PATCHES = {WanCausalConv3d: convolve}


def encode(vae, video):
    """Mean and log variance (B, 8, T, h, w) of video (B, 3, T, H, W), inside `per_frame`."""
    return vae.quant_conv(vae.encoder(video)).float().chunk(2, dim=1)


def decode(vae, latents):
    return vae.decoder(vae.post_quant_conv(latents)).float()


def latent_statistics(vae):
    shape = (1, parts.LATENT_CHANNELS, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
    return mean, torch.tensor(vae.config.latents_std, device=vae.device).view(shape)


def set_statistics(vae, means):
    vae.register_to_config(latents_mean=means.mean(1).tolist(), latents_std=means.std(1).tolist())


# ----------------------------------------------------------------------------------------- text


def build_tokenizer():
    return parts.build_tokenizer(TEXT_SLOTS)


def tokenize(tokenizer, captions):
    return parts.tokenize(tokenizer, captions, parts.TEXT_TOKENS)


def build_text_encoder(vocab_size):
    config = UMT5Config(
        vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=192, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def embed_text(text_encoder, ids):
    """Prompt embeddings (B, 512, 128), zero past each prompt's end as in WanPipeline."""
    mask = (ids > 0).long()
    hidden = text_encoder(ids, mask).last_hidden_state  # (B, TEXT_TOKENS, 128)
    return F.pad(hidden * mask[..., None], (0, 0, 0, TEXT_SLOTS - ids.shape[1]))


# ---------------------------------------------------------------------------------- transformer


def build_transformer(layers):
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=parts.LATENT_CHANNELS,
        out_channels=parts.LATENT_CHANNELS,
        text_dim=128,
        freq_dim=128,
        ffn_dim=768,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )


def blocks(transformer):
    return list(transformer.blocks)


def text_projection(transformer):
    return transformer.condition_embedder.text_embedder


def predict(transformer, noisy, timestep, text, ids, guidance=None):
    return transformer(noisy, timestep, text, return_dict=False)[0]


def assemble(vae, text_encoder, transformer):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return WanPipeline(
        tokenizer=build_tokenizer(), text_encoder=text_encoder, vae=vae, scheduler=scheduler,
        transformer=transformer,
    )  # fmt: skip


if __name__ == "__main__":
    train_main.main(sys.modules[__name__])
