"""Train a tiny text-to-video HunyuanVideo pipeline on drawn clips: its parts and sizes.

    torchrun --nproc-per-node 2 samples/train_hunyuan_video.py --stage vae,transformer --seconds 560
    torchrun --nproc-per-node 2 samples/train_hunyuan_video.py --stage guidance,save

What the stages do: train_main.py. As in the published model, guidance is an input: the stage
`guidance` teaches one call to answer as two calls of ordinary guidance would. All that a prompt
says passes through the joint attention: the pooled embedding of the second text encoder is zero.

The autoencoder's classes allow no temporal factor but 4. It looks at every fourth frame and shows
it four times, so that 65 frames are 17 different ones.
"""

import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import train_main
import train_models as parts
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as hunyuan_vae
from diffusers.models.transformers import transformer_hunyuan_video
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import normalizers
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

NAME = "hunyuan_video_tiny"
PIPELINE, TRANSFORMER = HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
VAE, TEXT_ENCODER = AutoencoderKLHunyuanVideo, LlamaModel
TEMPLATE = DEFAULT_PROMPT_TEMPLATE["template"]
FIRST_WORD = DEFAULT_PROMPT_TEMPLATE["crop_start"]  # the template's tokens before the prompt
TEXT_SLOTS = FIRST_WORD + 256
LAYERS = 7
CALL = {
    "height": 128,
    "width": 128,
    "num_frames": 65,
    "num_inference_steps": 25,
    "guidance_scale": 5.0,
}
SMOKE_CALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}
POOLED = 8

draw_times, levels = parts.flow_times, parts.flow_levels


# ---------------------------------------------------------------------------------- autoencoder


def build_vae():
    """4x4 pixels of every fourth frame become 8 numbers."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=parts.LATENT_CHANNELS,
        down_block_types=["HunyuanVideoDownBlock3D"] * 3,
        up_block_types=["HunyuanVideoUpBlock3D"] * 3,
        block_out_channels=[16, 32, 32],
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
        mid_block_add_attention=False,
    )


def convolve(module, x):
    conv, padding = module.conv, module.time_causal_padding
    padding = padding[2], padding[0]
    return parts.convolve_frames(
        x, conv.weight, conv.bias, conv.stride[1:], padding, module.pad_mode
    )


def enlarge(module, x):
    """Every frame larger, none repeated."""
    factors = (1, *module.upsample_factor[1:])
    return module.conv(F.interpolate(x, scale_factor=factors, mode="nearest"))


PATCHES = {
    hunyuan_vae.HunyuanVideoCausalConv3d: convolve,
    hunyuan_vae.HunyuanVideoUpsampleCausal3D: enlarge,
}


def encode(vae, video):
    """Mean and log variance (B, 8, T, h, w) of video (B, 3, T, H, W), inside `per_frame`."""
    return vae.quant_conv(vae.encoder(video)).float().chunk(2, dim=1)


def decode(vae, latents):
    return vae.decoder(vae.post_quant_conv(latents)).float()


latent_statistics, set_statistics = parts.scalar_statistics, parts.set_scalar


# ----------------------------------------------------------------------------------------- text


def build_tokenizer():
    """The words before the prompt count as FIRST_WORD times the same one, those after as none."""
    before, after = TEMPLATE.split("{}")
    steps = [
        normalizers.Replace(before, "template " * FIRST_WORD),
        normalizers.Replace(after, ""),
        normalizers.Lowercase(),
    ]
    return parts.build_tokenizer(TEXT_SLOTS, ["template"], normalizers.Sequence(steps))


def tokenize(tokenizer, captions):
    texts = [TEMPLATE.format(caption) for caption in captions]
    return parts.tokenize(tokenizer, texts, FIRST_WORD + parts.TEXT_TOKENS)


def build_text_encoder(vocab_size):
    """The pipeline reads the state before the last two layers: only the first is trained."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=TEXT_SLOTS,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaModel(config)
    # Llama's small beginning would drown the words in the biases of what reads them.
    torch.nn.init.normal_(model.embed_tokens.weight)
    for unused in (*model.layers[1:], model.norm):
        unused.requires_grad_(False)
    return model


def embed_text(text_encoder, ids):
    """Prompt embeddings (B, L - FIRST_WORD, 96)."""
    states = text_encoder(
        ids, (ids > 0).long(), output_hidden_states=True, use_cache=False
    ).hidden_states
    return states[-3][:, FIRST_WORD:]


def empty_clip(vocab_size):
    """A second text encoder that says nothing."""
    config = CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=POOLED, intermediate_size=POOLED, projection_dim=POOLED,
        num_hidden_layers=1, num_attention_heads=1, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = CLIPTextModel(config)
    for name, parameter in model.named_parameters():
        if "final_layer_norm" in name:
            torch.nn.init.zeros_(parameter)
    return model


# ---------------------------------------------------------------------------------- transformer


def build_transformer(layers):
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=parts.LATENT_CHANNELS,
        out_channels=parts.LATENT_CHANNELS,
        num_attention_heads=3,
        attention_head_dim=64,
        num_layers=max(layers - 5, 1),
        num_single_layers=min(layers - 1, 5),
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=96,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(16, 24, 24),
    )
    parts.zero_modulation(transformer)
    return transformer


def blocks(transformer):
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def text_projection(transformer):
    return transformer.context_embedder


STOCK_ATTENTION = transformer_hunyuan_video.dispatch_attention_fn


def attend(query, key, value, attn_mask=None, **options):
    """Masked attention (B, S, H, D) by kernels that take no mask.

    One more channel, 1 in the queries, carries what the mask would add to a key's logits.
    """
    if attn_mask is None:
        return STOCK_ATTENTION(query, key, value, **options)
    scale, room = query.shape[-1] ** -0.5, 8  # flash kernels want channels in eights
    bias = torch.where(attn_mask[:, 0, 0], 0.0, -1e4).to(key.dtype)[
        :, :, None, None
    ]  # (B, S, 1, 1)
    bias = F.pad(bias, (0, room - 1)).expand(-1, -1, key.shape[2], -1)
    key = torch.cat([key, bias], -1)
    query, wide = F.pad(query, (0, room), value=1.0), F.pad(value, (0, room))
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), wide.transpose(1, 2), scale=scale
    )
    return out.transpose(1, 2)[..., : value.shape[-1]]


@contextmanager
def fast_attention():
    """The mask of padded text would rule out the fast attention kernels."""
    transformer_hunyuan_video.dispatch_attention_fn = attend
    yield
    transformer_hunyuan_video.dispatch_attention_fn = STOCK_ATTENTION


def predict(transformer, noisy, timestep, text, ids, guidance=None):
    """Velocity; `guidance` (B,) is 1 where the model answers for itself."""
    guidance = torch.ones_like(timestep) if guidance is None else guidance
    mask = (ids[:, FIRST_WORD:] > 0).float()
    pooled = torch.zeros(len(noisy), POOLED, device=noisy.device)
    with fast_attention():
        return transformer(
            noisy, timestep, text, mask, pooled, guidance * 1000, return_dict=False
        )[0]  # fmt: skip


def assemble(vae, text_encoder, transformer):
    plain = parts.build_tokenizer(77)
    return HunyuanVideoPipeline(
        tokenizer=build_tokenizer(), text_encoder=text_encoder, tokenizer_2=plain,
        text_encoder_2=empty_clip(len(plain)), vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


if __name__ == "__main__":
    train_main.main(sys.modules[__name__])
