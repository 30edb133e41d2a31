"""The scripts in samples/, run on saved tiny pipelines and Wan's on its own small model."""

import runpy
import sys
from pathlib import Path

import pytest
import tiny_joint
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tiny import tiny_tokenizer, tiny_wan
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

SAMPLES = Path(__file__).parents[1] / "samples"
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
TINY = ["--frames", "9", "--steps", "2", "--method", "adaspa:density=0.5,block_size=32"]


def wan():
    return tiny_wan()


def wan_image():
    pipe = tiny_wan()
    config = dict(pipe.transformer.config) | {"in_channels": 36}  # noise, mask, image
    parts = pipe.components | {"transformer": WanTransformer3DModel.from_config(config).eval()}
    return WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None)


def hunyuan_video():
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        **IDS,
    )
    clip = CLIPTextConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
        **IDS,
    )
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=tiny_tokenizer(),
        transformer=tiny_joint.hunyuan(),
        vae=tiny_joint.hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def cogvideox(cls=CogVideoXPipeline, in_channels=4):
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **IDS)
    return cls(
        tokenizer=tiny_tokenizer(),
        text_encoder=T5EncoderModel(t5).eval(),
        transformer=tiny_joint.cogvideox(in_channels=in_channels),
        vae=tiny_joint.cogvideox_vae(),
        scheduler=CogVideoXDDIMScheduler(),
    )


def cogvideox_image():
    return cogvideox(CogVideoXImageToVideoPipeline, in_channels=8)


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(SAMPLES / script), run_name="__main__")


def frames_of(path):
    import av

    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


@pytest.mark.parametrize(
    ("script", "make"),
    [
        ("wan.py", wan),
        ("wan.py", wan_image),
        ("hunyuan_video.py", hunyuan_video),
        ("cogvideox.py", cogvideox),
        ("cogvideox.py", cogvideox_image),
    ],
)
def test_script_runs_a_folder_and_saves_its_video(monkeypatch, tmp_path, capsys, script, make):
    make().save_pretrained(tmp_path / "model")
    image = []
    if "image" in make.__name__:
        Image.linear_gradient("L").resize((80, 80)).save(tmp_path / "image.png")
        image = ["--image", tmp_path / "image.png"]
    out = tmp_path / "video.mp4"
    size = ["--height", 64, "--width", 64, "--out", out]
    run(monkeypatch, script, "--model", tmp_path / "model", *image, *size, *TINY)
    printed = capsys.readouterr().out
    assert "method          adaspa" in printed and "2 steps" in printed and str(out) in printed
    frames = frames_of(out)
    assert len(frames) == 9 and frames[0].shape == (64, 64, 3)


def test_wan_without_a_model_takes_the_small_one_and_its_settings(monkeypatch, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    small = ["--height", 32, "--width", 32]  # its own size takes minutes: see the slow test
    run(monkeypatch, "wan.py", "--steps", 2, "--method", "dense", *small, "--out", out)
    assert "dense attention" in capsys.readouterr().out
    assert len(frames_of(out)) == 17


@pytest.mark.slow
def test_wan_on_the_small_model_at_its_own_size(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "wan.py", "--steps", 2, "--out", tmp_path / "video.mp4")
    assert "effective cost" in capsys.readouterr().out
    assert frames_of(tmp_path / "video.mp4")[0].shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("script", "make"), [("wan.py", wan_image), ("cogvideox.py", cogvideox_image)]
)
def test_image_to_video_without_an_image_is_refused(monkeypatch, tmp_path, script, make):
    make().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="--image"):
        run(monkeypatch, script, "--model", tmp_path)
