"""Exact statements that DraftAttention, Re-ttention, Sparse-vDiT and DFSAttn must fulfil.

Others of the kind stand where their subject is tested: block mass sums to the rows and rho O + R is
dense (test_seeds), all blocks kept is dense (test_seeds, test_sparse_vdit), disjoint masks merge to
dense (test_tail), an order and its inverse are the identity (test_grid), levels of heads keep the
mean density (test_patterns).
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_seeds import BLOCK, close, make_search
from test_sparse_vdit import made
from test_wan import generate
from tiny import tiny_wan

from dit_sparse import (
    BlockMask,
    DFSAttn,
    DraftAttention,
    Rettention,
    SparseVDiT,
    VideoGrid,
    enable_sparse_attention,
    sparse_attention,
)
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.grid import token_order
from dit_sparse.patterns import score
from dit_sparse.patterns.correct import measure_correction
from dit_sparse.patterns.mode_table import ModeTable
from dit_sparse.patterns.sparse_vdit import MODES
from dit_sparse.reference import block_pool

METHODS = (DraftAttention, Rettention, DFSAttn, SparseVDiT)
GRIDS = [
    VideoGrid(5, 8, 16),
    VideoGrid(3, 7, 9),
    VideoGrid(3, 7, 9, 11),
    VideoGrid(3, 7, 9, 11, True),
]


@pytest.fixture
def build(tmp_path):
    """A config of any of the methods; Sparse-vDiT's two heads have the two `modes`."""

    def config(method, grid=GRIDS[0], modes="23", **options):
        options = {"density": 0.3, "block_size": BLOCK} | options
        if method is not SparseVDiT:
            return method(**options)
        shape = grid.frames, grid.height, grid.width
        place = "WanTransformer3DModel", 1, 2, shape, 1
        table = ModeTable(*place, options["density"], "raster", BLOCK, 0.5, 0.25, 1,
                          {branch: [[modes]] for branch in ("cond", "cond_uncond")})  # fmt: skip
        table.save(tmp_path / "modes.json")
        return SparseVDiT(table=str(tmp_path / "modes.json"), **options)

    return config


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_row_keeps_a_block_at_the_least_density(method, grid, build):
    search = make_search(grid)
    for modes in ("00", "23", "44"):
        mask = build(method, grid, modes, density=1e-6).find(search).mask
        assert mask.any(-1).all()
        assert mask.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_both_guidance_branches_in_one_batch_are_what_two_calls_are(method, grid, build):
    search = make_search(grid)
    config = build(method, grid)
    together = config.find(search).mask.expand(2, 2, -1, -1)
    packed = BlockMask.from_dense(together, grid.tokens, grid.tokens, (BLOCK, BLOCK))
    attend = partial(sparse_attention, return_lse=True)
    output, lse = attend(search.query, search.key, search.key, packed)
    for i in range(2):
        query, key = search.query[i : i + 1], search.key[i : i + 1]
        alone = config.find(replace(search, query=query, key=key, lse=search.lse[i : i + 1])).mask
        assert alone.expand(1, 2, -1, -1).equal(together[i : i + 1])
        packed = BlockMask.from_dense(alone, grid.tokens, grid.tokens, (BLOCK, BLOCK))
        for found, expected in zip(attend(query, key, key, packed), (output, lse)):
            close(found[0], expected[i])


def test_corrections_of_a_batch_are_those_of_its_samples(build):
    search = make_search(GRIDS[2])
    config = build(Rettention)
    mask = config.find(search).mask
    packed = BlockMask.from_dense(mask, *[GRIDS[2].tokens] * 2, (BLOCK, BLOCK))

    def correction(part):
        query, key = search.query[part], search.key[part]
        dense = dense_attention_with_lse(query, key, key)
        sparse = sparse_attention(query, key, key, packed, return_lse=True)
        return measure_correction(*dense, *sparse)

    both = correction(slice(None))
    for i in range(2):
        alone = correction(slice(i, i + 1))
        close(alone.rho[0], both.rho[i])
        close(alone.residual[0], both.residual[i])


@pytest.mark.parametrize("method", ["draftattention", "rettention", "dfsattn", "sparse-vdit"])
def test_two_videos_in_a_batch_are_what_each_is_alone(method, tmp_path):
    pipe = tiny_wan()
    options = {"density": 0.5, "block_size": BLOCK}
    if method == "sparse-vdit":
        options["table"] = made(pipe, tmp_path, epsilon=0.7)
    enable_sparse_attention(pipe, method, **options)
    prompts = ["a red ball", "a blue cube"]
    noise = torch.randn(2, 16, 3, 12, 12)
    both = generate(pipe, prompt=prompts, latents=noise)
    for i in range(2):
        alone = generate(pipe, prompt=prompts[i], latents=noise[i : i + 1])
        assert (alone[0] - both[i]).abs().max() < 1e-4


# Any order of queries and keys leaves attention as it is, so that masks alone make the difference.
@pytest.mark.parametrize("order", ["raster", "tile", "curve", "patch"])
def test_dense_attention_in_block_order_is_dense_attention(order):
    grid = VideoGrid(3, 7, 9)
    query, key, value = torch.randn(3, 2, grid.tokens, 2, 16)
    permutation, inverse = token_order(grid, order, BLOCK)
    expected, expected_lse = dense_attention_with_lse(query, key, value)
    ordered = (x[:, permutation] for x in (query, key, value))
    found, lse = dense_attention_with_lse(*ordered)
    close(found[:, inverse], expected)
    close(lse[..., inverse], expected_lse)


def test_means_of_draftattention_are_those_of_patches_of_a_frame():
    grid = VideoGrid(3, 16, 32)
    x = torch.randn(2, grid.tokens, 2, 4)
    found = block_pool(x[:, token_order(grid, "patch", 128)[0]], 128)  # (B, H, N, D)
    frames = x.permute(0, 2, 3, 1).reshape(2 * 2 * 4 * 3, 1, 16, 32)
    pooled = F.avg_pool2d(frames, (8, 16)).reshape(2, 2, 4, 3 * 2 * 2)
    close(found, pooled.mT)


def test_means_of_dfsattn_are_those_of_runs_of_its_curve_and_its_best_blocks_are_kept():
    grid = VideoGrid(5, 16, 16)
    search = make_search(grid)
    config = DFSAttn(density=0.3, search_at=(0.0,), own_block=False)
    mask = config.find(search).mask
    for b, h in ((0, 0), (1, 1)):
        q, k = (
            torch.stack([part.mean(0) for part in x[b, :, h].double().split(16)])
            for x in (search.query, search.key)
        )
        fine = (q @ k.T / 4).softmax(-1)
        for row in range(10):
            sums = [fine[8 * row : 8 * row + 8, 8 * j : 8 * j + 8].sum() for j in range(10)]
            best = sorted(range(10), key=lambda j: -sums[j])[:3]
            assert mask[b, h, row].nonzero().flatten().tolist() == sorted(best)
    scores, _ = score.pooled_sums(search, 128, 16)
    close(scores.sum(-1), torch.full((2, 2, 10), 8.0))  # each mean's softmax sums to 1


def test_a_head_of_sparse_vdit_that_is_full_is_dense_and_a_skipped_one_is_zero(build):
    grid = GRIDS[1]
    search = make_search(grid)
    modes = f"{MODES.index('full')}{MODES.index('skip')}"
    mask = build(SparseVDiT, grid, modes).find(search).mask
    packed = BlockMask.from_dense(mask, grid.tokens, grid.tokens, (BLOCK, BLOCK))
    value = torch.randn_like(search.key)
    output, lse = sparse_attention(search.query, search.key, value, packed, return_lse=True)
    dense, dense_lse = dense_attention_with_lse(search.query, search.key, value)
    close(output[:, :, 0], dense[:, :, 0])
    close(lse[:, 0], dense_lse[:, 0])
    assert (output[:, :, 1] == 0).all() and (lse[:, 1] == -torch.inf).all()
    assert packed.density.tolist() == [1.0, 0.0]
