"""Block masks to time kernels with: random, uneven, and real ones.

    python benchmarks/masks.py            # record the real ones again, a minute on a CPU

The real ones are AdaSpa masks of the boxed Wan pipeline (6 layers, 4 heads, 4,352 tokens in curve
order) at one search step, for each block size and density; each is enlarged to the length that is
timed by repeating its rows and columns, so clusters grow with it. What would mislead: a model of
14 B parameters has other masks, and an enlarged one is kinder to the L2 cache than a fine one.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dit_sparse.block_mask import BlockMask  # noqa: E402
from dit_sparse.grid import VideoGrid  # noqa: E402
from dit_sparse.patterns.adaspa import AdaSpa  # noqa: E402
from dit_sparse.patterns.select import forced_blocks  # noqa: E402

RECORDED = ROOT / "benchmarks" / "masks" / "adaspa_wan_tiny.npz"
DENSITIES = (0.5, 0.2, 0.1)
SIZES = (64, 128)


def random_mask(heads: int, blocks: int, density: float) -> Tensor:
    """Equally many random kv blocks a row, (1, H, N, N) bool."""
    keep = max(1, round(density * blocks))
    mask = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool, device="cuda")
    for head in range(heads):  # one at a time bounds the memory
        best = torch.rand(blocks, blocks, device="cuda").topk(keep, dim=-1).indices
        mask[0, head].scatter_(-1, best, True)
    return mask


def uneven_mask(heads: int, blocks: int, density: float) -> Tensor:
    """Random, but rows keep 0.25 to 1.75 times as much as the mean, and heads 0.5 to 1.5 times."""
    chance = torch.rand(1, heads, blocks, blocks, device="cuda")
    head = torch.linspace(0.5, 1.5, heads, device="cuda")[None, :, None, None]
    row = torch.rand(1, heads, blocks, 1, device="cuda") * 1.5 + 0.25
    mask = chance < density * head * row
    mask |= torch.eye(blocks, dtype=torch.bool, device="cuda")
    return mask


def real_mask(heads: int, blocks: int, density: float, block_size: int) -> Tensor:
    """A recorded mask of each head, enlarged, (1, H, N, N) bool."""
    with np.load(RECORDED) as file:
        packed = file[f"{block_size}_{density}"]
        count = int(file[f"{block_size}_blocks"])
    recorded = torch.from_numpy(np.unpackbits(packed, axis=-1, count=count)).bool().cuda()
    index = torch.arange(blocks, device="cuda") * count // blocks
    chosen = recorded[torch.arange(heads, device="cuda") % len(recorded)]
    return chosen[:, index][:, :, index][None]


def with_text(mask: Tensor, tokens: int, text: int, text_first: bool, block_size: int) -> Tensor:
    """The same mask with the forced blocks of a sequence that holds `text` text tokens."""
    grid = VideoGrid(1, 1, tokens - text, text_tokens=text, text_first=text_first)
    return mask | forced_blocks(grid, block_size, mask.device)


@dataclass(frozen=True)
class Recorder(AdaSpa):
    """AdaSpa that also keeps what it would find at every density and block size."""

    def find(self, search):
        for size in SIZES:
            for density in DENSITIES:
                found = AdaSpa(density=density, block_size=size).find(search)
                mask = found.mask.to_dense() if isinstance(found.mask, BlockMask) else found.mask
                MASKS.setdefault((size, density), []).append(mask[0].cpu().numpy())
        return super().find(search)


MASKS: dict[tuple[int, float], list[np.ndarray]] = {}  # of each layer and branch: (H, N, N)


def record(steps: int = 8) -> None:
    """One clip of the boxed pipeline in a few steps; the masks of the text branch are kept."""
    from dit_sparse import enable_sparse_attention
    from dit_sparse.loading import load_pipeline

    pipe = load_pipeline(None, "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 128, "num_frames": 16, "guidance_scale": 1.0}
    with enable_sparse_attention(pipe, Recorder(search_at=(0.5,))):
        pipe(
            prompt="a blue star moving up slowly over a sand background",
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **call,
        )
    arrays = {}
    for (size, density), layers in MASKS.items():
        heads = np.concatenate(layers)
        arrays[f"{size}_{density}"] = np.packbits(heads, axis=-1)
        arrays[f"{size}_blocks"] = np.array(heads.shape[-1])
        print(f"block {size} density {density}: {heads.shape}, kept {heads.mean():.3f}")
    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED, **arrays)
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes")


if __name__ == "__main__":
    argparse.ArgumentParser(description="Record the real masks again.").parse_args()
    record()
