"""The parts of the tiny Wan pipeline: sizes, tokenizer, per-frame autoencoder, saving."""

import json
import types
from contextlib import contextmanager
from pathlib import Path

import clips
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_SLOTS = 512  # what WanPipeline pads every prompt to
TEXT_TOKENS = 64  # longer than any caption
LATENT_CHANNELS = 8
CALL = {
    "height": 128,
    "width": 128,
    "num_frames": 16,  # WanPipeline returns 17: its temporal factor is 1
    "num_inference_steps": 25,
    "guidance_scale": 3.0,
}
PROMPTS = [
    "a red circle moving left",
    "a blue star moving up slowly over a sand background",
    "a large striped yellow ring moving right quickly over a dark blue background",
    "a pink triangle moving down, spinning, the camera pans left",
    "a cyan cross moving right in front of an orange square moving up",
    "a white square moving left behind a grey pillar over a brown background",
    "a small green star standing still over a purple background, the camera zooms in",
    "over a dark green background, an orange ring moves down very fast",
]


def build_vae(latents_mean=None, latents_std=None):
    """Autoencoder without temporal compression: 4x4 pixels of a frame become 8 numbers."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        scale_factor_temporal=1,
        scale_factor_spatial=4,
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS,
        latents_std=latents_std or [1.0] * LATENT_CHANNELS,
    )


def build_transformer(layers=6):
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=128,
        freq_dim=128,
        ffn_dim=768,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )


def build_text_encoder(vocab_size):
    config = UMT5Config(
        vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=192, num_layers=2, num_heads=4,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def build_tokenizer():
    words = ["<pad>", "</s>", "<unk>", *clips.vocabulary()]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=TEXT_SLOTS,
    )  # fmt: skip


def tokenize(tokenizer, captions):
    """Token ids (B, TEXT_TOKENS), zero-padded."""
    batch = tokenizer(
        captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    return batch.input_ids


def turned_words(tokenizer):
    """Token id of every word's opposite direction, of the word itself where it has none, (V,)."""
    turned = torch.arange(len(tokenizer))
    for a, b in (("left", "right"), ("up", "down")):
        i, j = tokenizer.convert_tokens_to_ids([a, b])
        turned[i], turned[j] = j, i
    return turned


def embed_text(text_encoder, ids):
    """Prompt embeddings (B, 512, 128), zero past each prompt's end as in WanPipeline."""
    mask = (ids > 0).long()
    hidden = text_encoder(ids, mask).last_hidden_state  # (B, TEXT_TOKENS, 128)
    return F.pad(hidden * mask[..., None], (0, 0, 0, TEXT_SLOTS - TEXT_TOKENS))


# ----------------------------------------------------------------------- per-frame autoencoder


def convolve_frame(conv, x, cache_x=None):
    """A causal convolution's last temporal tap as a 2-D convolution; x is (B, C, 1, H, W)."""
    weight, padding = conv.weight[:, :, -1], conv._padding[0]
    return F.conv2d(x[:, :, 0], weight, conv.bias, conv.stride[1:], padding)[:, :, None]


@contextmanager
def per_frame(vae):
    """Run the autoencoder on single frames, several times faster than its 3-D convolutions."""
    convs = [module for module in vae.modules() if isinstance(module, WanCausalConv3d)]
    for conv in convs:
        conv.forward = types.MethodType(convolve_frame, conv)
    yield vae
    for conv in convs:
        del conv.forward


def encode_frames(vae, frames):
    """Mean and log variance (N, 8, h, w) of frames (N, 3, H, W), inside `per_frame`."""
    frames = frames.contiguous(memory_format=torch.channels_last)
    return vae.quant_conv(vae.encoder(frames[:, :, None]))[:, :, 0].float().chunk(2, dim=1)


def decode_frames(vae, latents):
    return vae.decoder(vae.post_quant_conv(latents[:, :, None]))[:, :, 0].float()


@torch.no_grad()
def zero_past_taps(vae):
    """Drop the unused past of every causal convolution, so that stock code runs per frame too."""
    for conv in vae.modules():
        if isinstance(conv, WanCausalConv3d):
            conv.weight[:, :, :-1] = 0


def latent_statistics(vae):
    shape = (1, LATENT_CHANNELS, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
    return mean, torch.tensor(vae.config.latents_std, device=vae.device).view(shape)


# --------------------------------------------------------------------------------------- saving


def edit_json(path, change):
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def save_pipeline(folder, vae, text_encoder, transformer):
    """Write the diffusers folder in 16 bits, loadable offline and by transformers 4 and 5."""
    folder = Path(folder)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    pipe = WanPipeline(
        tokenizer=build_tokenizer(), text_encoder=text_encoder.half(), vae=vae.half(),
        scheduler=scheduler, transformer=transformer.half(),
    )  # fmt: skip
    pipe.save_pretrained(folder, max_shard_size="10MB")
    fast = "PreTrainedTokenizerFast"
    edit_json(folder / "model_index.json", lambda s: s.update(tokenizer=["transformers", fast]))
    edit_json(folder / "tokenizer/tokenizer_config.json", lambda s: s.update(tokenizer_class=fast))
    # transformers 5 loads in the dtype named here; the pipeline is meant to load in float32
    edit_json(folder / "text_encoder/config.json", lambda s: s.update(dtype="float32"))
    edit_json(folder / "vae/config.json", lambda s: s.pop("_name_or_path", None))
    box = {"call": CALL, "fps": 8, "prompts": PROMPTS}
    (folder / "dit_sparse.json").write_text(json.dumps(box, indent=2) + "\n")
