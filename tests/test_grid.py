"""Token orders: permutations of any grid, compact where they say so."""

import pytest
import torch

from dit_sparse.grid import TOKEN_ORDERS, VideoGrid, order_patches, tile_shape, token_order

GRIDS = [
    VideoGrid(1, 1, 1),
    VideoGrid(1, 5, 3),
    VideoGrid(5, 3, 7),
    VideoGrid(2, 9, 1),
    VideoGrid(21, 30, 52),
    VideoGrid(9, 8, 8, text_tokens=7),
]


@pytest.mark.parametrize("order", TOKEN_ORDERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_order_is_a_permutation_with_its_inverse(grid, order):
    permutation, inverse = token_order(grid, order)
    raster = torch.arange(grid.video_tokens)
    assert permutation.sort().values.equal(raster)
    assert raster[permutation][inverse].equal(raster)


@pytest.mark.parametrize("order", ["tile", "curve"])
def test_first_frame_stays_in_front(order):
    permutation, _ = token_order(VideoGrid(6, 5, 7), order)
    assert permutation[:35].max() < 35


@pytest.mark.parametrize("order", ["tile", "curve"])
def test_conditioning_frames_stay_in_front_together(order):
    permutation, _ = token_order(VideoGrid(6, 5, 7, conditioning_frames=2), order)
    assert permutation[:70].max() < 70
    one = VideoGrid(6, 5, 7, conditioning_frames=1)
    assert token_order(one, order)[0].equal(token_order(VideoGrid(6, 5, 7), order)[0])


def test_conditioning_span_and_blocks():
    grid = VideoGrid(4, 8, 8, conditioning_frames=1)
    assert grid.conditioning_span == (0, 64) and list(grid.conditioning_blocks(64)) == [0]
    assert grid.forced_share(64) == 1 / 4
    grid = VideoGrid(4, 8, 8, text_tokens=10, text_first=True, conditioning_frames=2)
    assert grid.conditioning_span == (10, 138) and list(grid.conditioning_blocks(64)) == [0, 1, 2]
    assert grid.forced_share(64) == 3 / 5
    grid = VideoGrid(4, 8, 8, text_tokens=10, conditioning_frames=1)
    assert grid.conditioning_span == (0, 64) and grid.forced_share(64) == 2 / 5
    assert VideoGrid(4, 8, 8).forced_share(64) == 0
    for frames in (-1, 5):
        with pytest.raises(ValueError, match="conditioning"):
            VideoGrid(4, 8, 8, conditioning_frames=frames)
    for sides in ((0, 8, 8), (4, 8, 0), (4, 8, 8, -1)):
        with pytest.raises(ValueError, match="at least one token along each axis"):
            VideoGrid(*sides)


def test_curve_walks_to_a_neighbour_each_step():
    permutation, _ = token_order(VideoGrid(9, 8, 8), "curve")
    place = coordinates(permutation[64:], 8, 8)
    assert (place[1:] - place[:-1]).abs().sum(1).max() == 1


def test_tile_is_a_box():
    permutation, _ = token_order(VideoGrid(9, 8, 8), "tile", block_size=64)
    box = coordinates(permutation[64:128], 8, 8)
    assert (box.amax(0) - box.amin(0)).tolist() == [3, 3, 3]


def test_curve_goes_through_axes_of_two_tokens():
    permutation, _ = token_order(VideoGrid(3, 2, 2), "curve")
    place = coordinates(permutation[4:], 2, 2)
    assert (place[1:] - place[:-1]).abs().sum(1).max() == 1


@pytest.mark.parametrize(("order", "frames"), [("tile", 5), ("patch", 1)])
def test_boxes_come_one_after_the_other_on_a_ragged_grid(order, frames):
    grid = VideoGrid(6, 5, 7)
    permutation, _ = token_order(grid, order, block_size=16)
    size = torch.tensor(tile_shape(frames, 16))
    place = coordinates(permutation[35:], 5, 7) - torch.tensor([1, 0, 0])
    keys = torch.cat([place // size, place % size], 1).tolist()
    assert keys == sorted(keys)


@pytest.mark.parametrize("order", ["tile", "curve"])
def test_blocks_are_more_compact_than_raster_on_a_ragged_grid(order):
    grid = VideoGrid(21, 30, 52)
    assert spread(grid, order) < spread(grid, "raster") / 4


def test_tile_shape_holds_one_block():
    assert tile_shape(16, 64) == (4, 4, 4)
    assert tile_shape(1, 64) == (1, 8, 8)
    assert tile_shape(16, 128) == (4, 4, 8)
    assert tile_shape(2, 64) == (2, 4, 8) and tile_shape(5, 16) == (2, 2, 4)


def test_text_span_and_blocks():
    after = VideoGrid(2, 8, 8, text_tokens=10)
    before = VideoGrid(2, 8, 8, text_tokens=10, text_first=True)
    assert after.text_span == (128, 138) and list(after.text_blocks(64)) == [2]
    assert before.text_span == (0, 10) and list(before.text_blocks(64)) == [0]
    assert after.video_span == (0, 128) and before.video_span == (10, 138)
    assert after.block_lengths(64).tolist() == [64, 64, 10]
    assert not VideoGrid(2, 8, 8).text_blocks(64)


def test_unknown_order_names_the_known_ones():
    with pytest.raises(ValueError, match="raster, tile, curve"):
        token_order(VideoGrid(2, 2, 2), "spiral")


def coordinates(index, height, width):
    return torch.stack([index // (height * width), index // width % height, index % width], 1)


def spread(grid, order):
    """Mean variance of the places of a block's tokens."""
    place = coordinates(token_order(grid, order)[0], grid.height, grid.width).float()
    return torch.stack([block.var(0).sum() for block in place.split(64)]).mean()


def test_ordered_patches_give_ordered_tokens():
    """The last row and column are no whole patch, and a convolution leaves them out."""
    grid, patch = VideoGrid(2, 3, 4), (2, 2, 3)
    embedding = torch.nn.Conv3d(3, 5, patch, stride=patch)
    latents, permutation = torch.randn(2, 3, 4, 7, 13), torch.randperm(grid.video_tokens)
    ordered = order_patches(latents, grid, patch, permutation)
    tokens, expected = (embedding(x).flatten(2) for x in (ordered, latents))
    assert (tokens - expected[..., permutation]).abs().max() < 1e-6
