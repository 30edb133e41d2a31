"""A tiny Wan pipeline with random weights, built offline: tests of everything but quality."""

import atexit
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<s>": 3}
CALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 3.0}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    letters = "abcdefghijklmnopqrstuvwxyz ,.0123456789"
    vocabulary = SPECIAL | {letter: i + len(SPECIAL) for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=512,
    )


def tiny_wan(seed: int = 0, head_dim: int = 16) -> WanPipeline:
    """Two layers, two heads; 9 frames of 64x64 become 3 x 4 x 4 tokens."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=3.0,
    )
    pipe = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_wan(folder: Path) -> Path:
    """The pipeline as a diffusers directory, without a `dit_sparse.json`."""
    tiny_wan().save_pretrained(folder)
    return folder


@cache
def tiny_folder() -> Path:
    """A saved tiny pipeline with its `dit_sparse.json`, made once per process."""
    folder = save_tiny_wan(Path(mkdtemp(prefix="tiny-wan-")))
    stored = {"call": CALL, "fps": 8, "prompts": ["a red circle", "a blue square"]}
    (folder / "dit_sparse.json").write_text(json.dumps(stored))
    atexit.register(shutil.rmtree, folder)
    return folder
