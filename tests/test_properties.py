"""Properties of grids, orders and masks on inputs that hypothesis draws."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.block_mask import BlockMask
from dit_sparse.grid import TOKEN_ORDERS, VideoGrid, order_patches, token_order
from dit_sparse.patterns.select import forced_blocks, top_k_rows
from dit_sparse.reference import sparse_attention
from dit_sparse.schedule import search_steps, step_kind

SIDES = st.integers(1, 9)
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def grids(draw):
    frames, height, width = draw(SIDES), draw(SIDES), draw(SIDES)
    return VideoGrid(
        frames,
        height,
        width,
        text_tokens=draw(st.integers(0, 40)),
        text_first=draw(st.booleans()),
        conditioning_frames=draw(st.integers(0, frames)),
    )


@st.composite
def masks(draw):
    """A bool mask of any shape, with the lengths and blocks it is for."""
    block = draw(st.sampled_from([16, 32, 64])), draw(st.sampled_from([16, 32, 64]))
    q_len, kv_len = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    blocks = -(-q_len // block[0]), -(-kv_len // block[1])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(*shape, *blocks, generator=generator) < draw(st.floats(0, 1))
    return mask, q_len, kv_len, block


@QUICK
@given(grids(), st.sampled_from(list(TOKEN_ORDERS)), st.sampled_from([16, 32, 64, 128]))
def test_any_order_of_any_grid_is_a_permutation_with_given_frames_in_front(grid, order, block):
    permutation, inverse = token_order(grid, order, block)
    raster = torch.arange(grid.video_tokens)
    assert permutation.sort().values.equal(raster) and permutation[inverse].equal(raster)
    leading = grid.conditioning_frames * grid.height * grid.width
    assert permutation[:leading].sort().values.equal(raster[:leading])


@QUICK
@given(grids(), st.sampled_from([16, 64, 128]))
def test_block_lengths_cover_the_tokens_and_forced_blocks_their_spans(grid, block):
    lengths = grid.block_lengths(block)
    assert int(lengths.sum()) == grid.tokens and int(lengths[:-1].min() if len(lengths) > 1 else 1)
    assert 0 <= grid.forced_share(block) <= 1
    owner = torch.arange(grid.tokens) // block
    for (start, end), blocks in (
        (grid.text_span, grid.text_blocks(block)),
        (grid.conditioning_span, grid.conditioning_blocks(block)),
    ):
        assert owner[start:end].unique().tolist() == list(blocks)


@QUICK
@given(grids(), st.tuples(*[st.integers(1, 3)] * 3))
def test_ordered_patches_hold_the_patches_in_order(grid, patch):
    sides = [n * p for n, p in zip((grid.frames, grid.height, grid.width), patch)]
    latents = torch.arange(2 * sides[0] * sides[1] * sides[2]).reshape(1, 2, *sides).float()
    permutation = token_order(grid, "curve")[0]

    def patches(x):
        pieces = x
        for axis, size in zip((2, 3, 4), patch):
            pieces = pieces.unfold(axis, size, size)
        return pieces.reshape(1, 2, grid.video_tokens, -1)

    ordered = order_patches(latents, grid, patch, permutation)
    assert patches(ordered).equal(patches(latents)[:, :, permutation])


@QUICK
@given(masks())
def test_a_mask_comes_back_from_its_bits_and_lists(drawn):
    mask, q_len, kv_len, block = drawn
    packed = BlockMask.from_dense(mask, q_len, kv_len, block)
    assert packed.to_dense().equal(mask)
    counts, indices = packed.indices()
    again = torch.zeros_like(mask)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:3])).tolist():
        again[tuple(place)][indices[tuple(place)][: counts[tuple(place)]].long()] = True
    assert again.equal(mask)
    tokens = mask.repeat_interleave(block[0], 2)[:, :, :q_len]
    tokens = tokens.repeat_interleave(block[1], 3)[..., :kv_len]
    assert torch.allclose(packed.density, tokens.float().mean((0, 2, 3)), atol=1e-5)


@QUICK
@given(masks())
def test_sparse_attention_is_softmax_over_the_kept_tokens(drawn):
    mask, q_len, kv_len, block = drawn
    batch, heads = mask.shape[:2]
    query, key, value = (torch.randn(batch, n, heads, 8) for n in (q_len, kv_len, kv_len))
    packed = BlockMask.from_dense(mask, q_len, kv_len, block)
    output, _ = sparse_attention(query, key, value, packed)
    tokens = mask.repeat_interleave(block[0], 2)[:, :, :q_len]
    tokens = tokens.repeat_interleave(block[1], 3)[..., :kv_len]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
    weights = logits.masked_fill(~tokens, -torch.inf).softmax(-1).nan_to_num(0)
    assert (output - torch.einsum("bhqk,bkhd->bqhd", weights, value)).abs().max() < 1e-5


@QUICK
@given(st.integers(1, 12), st.data())
def test_top_k_keeps_what_is_forced_and_the_heaviest_rest(blocks, data):
    scores = torch.rand(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(blocks))
    kept = data.draw(st.integers(1, blocks))
    counts = torch.full((1, 2), kept)
    forced = torch.eye(blocks, dtype=torch.bool)
    mask = top_k_rows(scores, counts, forced)
    assert (mask | ~forced).all() and (mask.sum(-1) == kept).all()
    lightest = torch.where(mask & ~forced, scores, torch.inf).amin(-1)
    assert (torch.where(mask, -torch.inf, scores).amax(-1) <= lightest).all()


@QUICK
@given(grids())
def test_forced_blocks_hold_text_in_rows_and_columns(grid):
    forced = forced_blocks(grid, 32, torch.device("cpu"))
    text = list(grid.text_blocks(32))
    assert forced[text].all() and forced[:, text].all() and forced.diagonal().all()


@QUICK
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.integers(1, 60),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_whatever_a_cache_skips_a_due_search_is_made_up_for(fractions, num_steps, skipped):
    due, found = search_steps(tuple(fractions), num_steps), None
    for step in range(num_steps):
        if skipped[step]:
            continue
        kind = step_kind(step, num_steps, tuple(fractions), found)
        latest = max((s for s in due if s <= step), default=None)
        if latest is None:
            assert kind == "dense"
            continue
        assert (kind == "search") == (found is None or found < latest)
        found = step if kind == "search" else found
