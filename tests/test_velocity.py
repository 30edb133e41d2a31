"""benchmarks/velocity.py: errors of single predictions, each from dense's own latents."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import CALL, tiny_wan
from tiny_joint import PIPELINES

from dit_sparse import Window, enable_sparse_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from velocity import DenseTrajectory, predictions  # noqa: E402

BLOCKS = {"block_size": 32, "search_at": (0.2,)}


def families():
    yield "Wan", tiny_wan, CALL | {"prompt": "a cat"}
    for name in ("HunyuanVideo", "CogVideoX", "Mochi"):
        make, call = PIPELINES[name]
        yield name, make, call(1, True)


@pytest.mark.parametrize(("name", "make", "call"), families(), ids=lambda x: str(x)[:12])
@torch.no_grad()
def test_every_step_starts_from_the_dense_latents(name, make, call):
    pipe = make()
    fixed = call | {"num_inference_steps": 4, "output_type": "latent"}

    def generate(**more):
        return pipe(**fixed, generator=torch.Generator().manual_seed(0), **more).frames

    trajectory = DenseTrajectory(pipe.transformer, generate)
    assert trajectory.error() == 0
    with enable_sparse_attention(pipe, Window(density=0.3, **BLOCKS)):
        apart, again = trajectory.error(), trajectory.error()
        with predictions(pipe.transformer) as found:
            trajectory.generate(callback_on_step_end=trajectory.go_back)
    assert 0 < apart == again < 1
    first = len(found) // 4  # calls of the dense first step
    torch.testing.assert_close(found[:first], trajectory.predicted[:first])
    errors = torch.stack([(a - b).square().mean() for a, b in zip(found, trajectory.predicted)])
    power = torch.stack([b.square().mean() for b in trajectory.predicted])
    assert apart == pytest.approx(float((errors.sum() / power.sum()).sqrt()), rel=1e-5)
    # the second step's input is dense's, so its error is that of its own masks alone
    with enable_sparse_attention(pipe, Window(density=0.3, **BLOCKS)):
        with predictions(pipe.transformer) as free:
            generate()
    torch.testing.assert_close(found[: 2 * first], free[: 2 * first])
    assert not all(a.equal(b) for a, b in zip(found[2 * first :], free[2 * first :]))


@torch.no_grad()
def test_a_generation_of_several_runs_goes_back_to_the_latents_of_each():
    pipe = tiny_wan()
    fixed = CALL | {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}

    def generate(**more):
        for seed in range(2):
            pipe(**fixed, generator=torch.Generator().manual_seed(seed), **more)

    assert DenseTrajectory(pipe.transformer, generate).error() == 0
