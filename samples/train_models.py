"""What the three tiny pipelines share: words, noise levels, the autoencoder on frames, saving."""

import json
import types
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import clips
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

TEXT_TOKENS = 64  # longer than any caption
LATENT_CHANNELS = 8
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


# ---------------------------------------------------------------------------------------- words


def build_tokenizer(slots, extra_words=(), normalizer=None):
    """One id a word; `</s>` ends a text, `<pad>` fills it up to `slots`."""
    words = ["<pad>", "</s>", "<unk>", *clips.vocabulary(), *extra_words]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    steps = [normalizers.Lowercase()] if normalizer is None else [normalizer]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=slots,
    )  # fmt: skip


def tokenize(tokenizer, texts, length):
    """Token ids (B, length), zero-padded."""
    batch = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return batch.input_ids


def turned_words(tokenizer):
    """Token id of every word's opposite direction, of the word itself where it has none, (V,)."""
    turned = torch.arange(len(tokenizer))
    for a, b in (("left", "right"), ("up", "down")):
        i, j = tokenizer.convert_tokens_to_ids([a, b])
        turned[i], turned[j] = j, i
    return turned


# --------------------------------------------------------------------------------- noise levels


class Levels(NamedTuple):
    """Noisy = clean * keep + noise * add; the model predicts noise * up - clean * down. All (B,)"""

    keep: Tensor
    add: Tensor
    up: Tensor
    down: Tensor
    timestep: Tensor


def flow_levels(time):
    """Flow matching at `time` (B,) in [0, 1]."""
    one = torch.ones_like(time)
    return Levels(1 - time, time, one, one, time * 1000)


def flow_times(count, shift, device):
    """Logit-normal times, moved towards noise as the sampler's flow shift moves its own."""
    time = torch.randn(count, device=device).sigmoid()
    return shift * time / (1 + (shift - 1) * time)


def zero_modulation(transformer):
    """Blocks begin as the identity and the output as zero."""
    for name, module in transformer.named_modules():
        parent, _, last = name.rpartition(".")
        if name == "proj_out" or (last == "linear" and "norm" in parent.split(".")[-1]):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------ autoencoder on frames


def convolve_frames(x, weight, bias, stride, padding, mode="constant"):
    """The last temporal tap of a causal convolution, frame by frame; x is (B, C, T, H, W)."""
    frames = x.transpose(1, 2).flatten(0, 1)
    if mode == "replicate":
        high, wide = padding
        frames, padding = F.pad(frames, (wide, wide, high, high), mode=mode), 0
    frames = frames.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(frames, weight[:, :, -1], bias, stride, padding)
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


@contextmanager
def per_frame(vae, patches):
    """Run the autoencoder frame by frame, several times faster than its 3-D convolutions."""
    patched = [module for module in vae.modules() if type(module) in patches]
    for module in patched:
        module.forward = types.MethodType(patches[type(module)], module)
    yield vae
    for module in patched:
        del module.forward


@torch.no_grad()
def zero_past_taps(vae):
    """Drop the unused past of every causal convolution, so that stock code runs per frame too."""
    for conv in vae.modules():
        if isinstance(conv, nn.Conv3d):
            conv.weight[:, :, :-1] = 0


def scalar_statistics(vae):
    """Mean and deviation of the latents of an autoencoder that has one scaling factor."""
    return 0.0, 1 / vae.config.scaling_factor


def set_scalar(vae, means):
    """`means` (8, N): latents of many frames."""
    vae.register_to_config(scaling_factor=1 / means.var(1).mean().sqrt().item())


# --------------------------------------------------------------------------------------- saving


def edit_json(path, change):
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def save_pipeline(folder, pipe, call):
    """Write the diffusers folder in 16 bits, loadable offline and by transformers 4 and 5."""
    folder = Path(folder)
    pipe.save_pretrained(folder, max_shard_size="10MB")
    fast = "PreTrainedTokenizerFast"
    for path in folder.glob("tokenizer*"):
        edit_json(path / "tokenizer_config.json", lambda s: s.update(tokenizer_class=fast))
        change = {path.name: ["transformers", fast]}
        edit_json(folder / "model_index.json", lambda s, change=change: s.update(change))
    for path in folder.glob("text_encoder*"):
        # transformers 5 loads in the dtype named here; the pipeline is meant to load in float32
        edit_json(path / "config.json", lambda s: s.update(dtype="float32"))
    edit_json(folder / "vae/config.json", lambda s: s.pop("_name_or_path", None))
    box = {"call": call, "fps": 8, "prompts": PROMPTS}
    (folder / "dit_sparse.json").write_text(json.dumps(box, indent=2) + "\n")
