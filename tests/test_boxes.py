"""The small trained pipelines: they load offline by their own class, and sparsity works on them."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from dit_sparse import enable_sparse_attention
from dit_sparse.loading import BOXES, boxed_pipeline, call_arguments, find_pipeline, load_pipeline

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from boxed import open_boxed  # noqa: E402

CLASSES = "WanPipeline", "HunyuanVideoPipeline", "CogVideoXPipeline", "WanPipeline"
STEPS = 25, 25, 25, 4
LITTLE = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3}


@pytest.mark.parametrize("name, cls, steps", zip(BOXES, CLASSES, STEPS))
def test_a_box_loads_by_its_name_and_its_own_class(name, cls, steps):
    pipe = load_pipeline(name, "cpu", torch.float32)
    assert type(pipe).__name__ == cls
    arguments = call_arguments(pipe, name)
    assert arguments.call["num_inference_steps"] == steps and arguments.prompts


TABLES = "wan_tiny", "hunyuan_video_tiny", "cogvideox_tiny"


@pytest.mark.parametrize("name, other", zip(TABLES, TABLES[1:] + TABLES[:1], strict=True))
def test_sparse_vdit_finds_the_modes_of_a_box_and_refuses_those_of_another(name, other):
    pipe = load_pipeline(name, "cpu", torch.float32)
    arguments = call_arguments(pipe, name)
    table = enable_sparse_attention(pipe, "sparse-vdit").config.load()
    assert table.num_steps == arguments.call["num_inference_steps"]
    with pytest.raises(ValueError, match="another model|of a .*Transformer3DModel"):
        enable_sparse_attention(
            pipe, "sparse-vdit", table=boxed_pipeline(other) / "sparse_vdit.json"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_sparse_vdit_runs_on_a_box_at_its_own_size(name):
    """Nearer to dense than random blocks of the same density."""
    pipe, arguments = open_boxed(name, "float32")
    call = arguments.call | {"num_inference_steps": 3, "output_type": "latent"}

    def latents():
        return pipe(arguments.prompts[0], generator=torch.Generator().manual_seed(0), **call).frames

    dense = latents()
    with enable_sparse_attention(pipe, "sparse-vdit") as handle:
        found = latents()
        density = handle.report().effective_cost
    assert 0.05 < density < 0.9
    with enable_sparse_attention(pipe, "random", density=density, search_at=(0.0,)):
        other = latents()
    assert (found - dense).square().mean() < (other - dense).square().mean()


@pytest.mark.parametrize("name", BOXES)
def test_full_density_is_dense_and_low_density_is_near(name, caplog):
    pipe, arguments = open_boxed(name, "bfloat16")
    call = arguments.call | LITTLE
    if "hunyuan" in name:  # every fourth of its frames is a latent one
        call["num_frames"] = 17

    def frames():
        generator = torch.Generator().manual_seed(0)
        return pipe(arguments.prompts[0], generator=generator, output_type="pt", **call).frames

    dense = frames()
    assert dense.dtype == torch.float32 and dense.isfinite().all()
    logging.getLogger("diffusers").addHandler(caplog.handler)
    with enable_sparse_attention(pipe, density=0.5, search_at=(0.3,)) as handle:
        sparse = frames()
        assert 0 < handle.report().density < 1
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert "divisible by 1." not in caplog.text  # which WanPipeline would say at every call
    assert not torch.equal(sparse, dense)
    assert (sparse - dense).square().mean() < (dense - dense.mean()).square().mean()
    assert torch.equal(frames(), dense)


def test_a_folder_goes_before_a_box_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_pipeline(BOXES[1]) == boxed_pipeline(BOXES[1])
    (tmp_path / BOXES[1]).mkdir()
    assert find_pipeline(BOXES[1]) == Path(BOXES[1])
    assert find_pipeline("someone/model") == "someone/model"
    assert find_pipeline(None) == boxed_pipeline()
