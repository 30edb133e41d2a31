"""Tiny pipelines of all families for tests of what is used beside sparse attention."""

from functools import partial

import diffusers
import pytest
import torch
from tiny import CALL, tiny_wan
from tiny_joint import PIPELINES, mochi_call, mochi_pipeline, set_guidance
from tiny_ltx_video import ltx_call, ltx_pipeline
from tiny_wan_family import FRAMES, HEIGHT, WIDTH, skyreels, text

from dit_sparse import enable_sparse_attention

FAMILIES = "Wan", "HunyuanVideo", "CogVideoX"  # on a GPU, too
MORE_FAMILIES = "HunyuanVideo-1.5", "LTX-Video", "SkyReels-V2", "Mochi"
JOINT = "HunyuanVideo", "HunyuanVideo-1.5", "CogVideoX"
SPARSE = {"method": "adaspa", "density": 0.4, "block_size": 32, "search_at": (0.2, 0.6)}
STEPS = 5


def skyreels_call(batch, guided):
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return size | text() | {"guidance_scale": 3.0 if guided else 1.0}


MAKE = {
    "Wan": tiny_wan,
    "LTX-Video": partial(ltx_pipeline, "LTXPipeline"),
    "SkyReels-V2": lambda: skyreels()[0],
    "Mochi": mochi_pipeline,
} | {family: PIPELINES[family][0] for family in JOINT}
CALLS = {"LTX-Video": ltx_call, "SkyReels-V2": skyreels_call, "Mochi": mochi_call} | {
    family: PIPELINES[family][1] for family in JOINT
}
# What diffusers 0.36 does not do on a CPU, or not at all, without us either.
DIFFUSERS_0_36 = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 37)
not_in_0_36 = pytest.mark.skipif(DIFFUSERS_0_36, reason="diffusers 0.36 cannot")


def over_families(feature, *families, **marks):
    """Run a test on each family, as cells of docs/compatibility.md."""
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(family, marks=pytest.mark.feature(feature, family, **marks))
            for family in families or FAMILIES + MORE_FAMILIES
        ],
    )


def make(family):
    return MAKE[family]()


def arguments(family, guided=True):
    if family == "Wan":
        guidance = {"guidance_scale": 3.0 if guided else 1.0}
        return CALL | guidance | {"prompt": "a red ball", "max_sequence_length": 16}
    generator_state = torch.get_rng_state()
    torch.manual_seed(7)
    call = CALLS[family](1, guided)
    torch.set_rng_state(generator_state)
    return call


def generate(pipe, family, guided=True, **call):
    given = {"num_inference_steps": STEPS, "output_type": "latent"} | call
    set_guidance(pipe, guided)
    return pipe(
        **arguments(family, guided) | given, generator=torch.Generator().manual_seed(0)
    ).frames


def tile_vae(pipe, family):
    """Tiles smaller than the video, so that they are cut."""
    tile = {"Wan": 32, "SkyReels-V2": 32, "LTX-Video": 96}.get(family, 24)
    pipe.vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile)


def compile_blocks(pipe, counter):
    if pipe.transformer._repeated_blocks:
        pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        return
    for block in pipe.transformer.transformer_blocks:  # CogVideoX: diffusers names none
        block.compile(backend=counter, fullgraph=True)


def first_block(threshold):
    return lambda pipe: pipe.transformer.enable_cache(
        diffusers.FirstBlockCacheConfig(threshold=threshold)
    )


def sparse(family, change=None, order="after", guided=True):
    """Frames and handle of a run with sparse attention, with a change before or after enabling."""
    pipe = make(family)
    if change is not None and order == "before":
        change(pipe)
    handle = enable_sparse_attention(pipe, **SPARSE)
    if change is not None and order == "after":
        change(pipe)
    return generate(pipe, family, guided), handle


def self_attentions(handle):
    return [swap.module for installed in handle._installed for swap in installed.swaps]
