"""Compile the kernels as the launchers call them, for a GPU that is not here.

    python tests/compile_kernels.py sm_90 [--all] [--only NAME]

A stand-in driver names the target and every launch stops after compilation. Prints one line of
JSON a kernel: shared memory in bytes and counts of instructions.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from dit_sparse.kernels import dot, tiles  # noqa: E402
from dit_sparse.kernels.block_lists import block_lists  # noqa: E402
from dit_sparse.kernels.block_mass import block_mass  # noqa: E402
from dit_sparse.kernels.block_pool import block_pool, pool_keys_values  # noqa: E402
from dit_sparse.kernels.block_sparse_fwd import block_sparse_fwd  # noqa: E402
from dit_sparse.kernels.sampled_mass import sampled_mass  # noqa: E402
from dit_sparse.kernels.select_rows import select_rows, work_order
from dit_sparse.kernels.tail_fwd import tail_fwd  # noqa: E402
from dit_sparse.kernels.top_k import top_k  # noqa: E402

GLUON_TILES = [tiles.Tile(128, 128, 8, 2, True), tiles.Tile(128, 128, 8, 3, True)]
GLUON_TILES += [tiles.Tile(64, 64, 4, 2, True)]
GLUON_TILES += [tiles.Tile(128, 64, 8, 2, True), tiles.Tile(64, 128, 4, 2, True)]


class Driver:
    """The four questions that triton asks before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launches(everything: bool, precisions: tuple[str, ...]):
    """(name, call) of each configuration; the ones users meet first unless `everything`."""
    head_dims = (16, 32, 64, 96, 128, 256) if everything else (128,)
    dtypes = (torch.bfloat16, torch.float32) if everything else (torch.bfloat16,)
    sizes = ((128, 128), (128, 64), (64, 64), (32, 32)) if everything else ((128, 128), (64, 64))
    for head_dim in head_dims:
        for dtype in dtypes:
            x = torch.zeros(1, 512, 2, head_dim, dtype=dtype)
            lse = torch.zeros(1, 2, 512)
            # A float32 tile is smaller than any block: one size shows them all.
            for size in sizes if dtype != torch.float32 else sizes[:1]:
                counts = torch.zeros(1, 2, 512 // size[0], dtype=torch.int32)
                indices = torch.zeros(1, 2, 512 // size[0], 8, dtype=torch.int16)
                name = f"d{head_dim} {dtype} {size}"
                yield (
                    f"fwd {name}",
                    lambda x=x, c=counts, i=indices, s=size: block_sparse_fwd(
                        x, x, x, c, i, block_size=s, order=c.flatten()
                    ),
                )
                for precision in precisions if dtype != torch.float32 and head_dim > 16 else ():
                    yield (
                        f"{precision} fwd {name}",
                        lambda x=x, c=counts, i=indices, s=size, p=precision: block_sparse_fwd(
                            x, x, x, c, i, block_size=s, order=c.flatten(), precision=p
                        ),
                    )
                yield (
                    f"mass {name}",
                    lambda x=x, lse=lse, s=size: block_mass(x, x, lse, block_size=s),
                )
                yield (
                    f"sampled {name}",
                    lambda x=x, s=size: sampled_mass(x, x, s[0] // 8, s[1]),
                )
                bits = torch.zeros(1, 2, 512 // size[0], -(-512 // size[1] // 8), dtype=torch.uint8)
                for tokens in (size[1], 16):
                    means = torch.zeros(1, 512 // tokens, 2, head_dim, dtype=dtype)
                    yield (
                        f"tail of {tokens} {name}",
                        lambda x=x, m=means, b=bits, lse=lse, s=size, t=tokens: tail_fwd(
                            x,
                            m,
                            m,
                            b,
                            block_size=s,
                            max_kv_len=512,
                            tail_tokens=t,
                            sparse=(x, lse),
                            residual=(x.to(torch.float8_e4m3fn), x[..., :1].float(), lse),
                        ),
                    )
            for tokens in (128, 16):
                yield f"pool of {tokens} {name}", lambda x=x, t=tokens: block_pool(x, t)
                yield (
                    f"pool of {tokens} keys and values {name}",
                    lambda x=x, t=tokens: pool_keys_values(x, x, t),
                )
    scores, kept = torch.zeros(1, 2, 4, 1000), torch.ones(1, 2, dtype=torch.int64)
    yield "top k", lambda: top_k(scores, kept, torch.zeros(4, 1000, dtype=torch.bool))
    budgets = 1, 2, 3, 0.8
    few = kept.int()
    yield (
        "selection",
        lambda: select_rows(scores, few, torch.zeros(4, 1000).bool(), (256, 64000), 64, budgets),
    )
    yield "order", lambda: work_order(torch.zeros(1, 2, 300, dtype=torch.int32))
    yield "lists", lambda: block_lists(torch.zeros(1, 2, 4, 8, dtype=torch.uint8), 60, 60)


def gluon_launches():
    """Every tile that the Gluon kernel may be given; Hopper only."""
    for head_dim in (64, 128):
        x = torch.zeros(1, 512, 2, head_dim, dtype=torch.bfloat16)
        for tile in GLUON_TILES:
            size = (tile.rows, tile.columns)
            counts = torch.zeros(1, 2, 512 // size[0], dtype=torch.int32)
            indices = torch.zeros(1, 2, 512 // size[0], 8, dtype=torch.int16)
            yield (
                f"gluon d{head_dim} {tile[:4]}",
                lambda x=x, c=counts, i=indices, s=size, t=tile: block_sparse_fwd(
                    x, x, x, c, i, block_size=s, order=c.flatten(), tile=t
                ),
            )


def gluon_fp8_launches():
    for head_dim in (64, 128):
        x = torch.zeros(1, 512, 2, head_dim, dtype=torch.bfloat16)
        for tile in tiles.GLUON_FP8:
            for rows in (64, 128):
                counts = torch.zeros(1, 2, 512 // rows, dtype=torch.int32)
                indices = torch.zeros(1, 2, 512 // rows, 8, dtype=torch.int16)
                options = {"block_size": (rows, tile.columns), "order": counts.flatten()}
                options |= {"precision": "fp8", "tile": tile}
                run = partial(block_sparse_fwd, x, x, x, counts, indices, **options)
                yield f"gluon fp8 d{head_dim} {rows} {tile[:4]}", run


def gluon_mass_launches():
    lse = torch.zeros(1, 2, 512)
    for head_dim in (64, 128):
        x = torch.zeros(1, 512, 2, head_dim, dtype=torch.bfloat16)
        for tile in (tiles.Tile(128, 128, 8, 4, True), tiles.Tile(128, 64, 8, 4, True)):
            run = partial(block_mass, x, x, lse, block_size=(64, 64), tile=tile)
            yield f"gluon mass d{head_dim} {tile[:4]}", run


def is_serialized(ptx: str) -> bool:
    """Whether ptxas says that it lets no two matrix products overlap.

    Raises:
        RuntimeError: no ptxas of Triton takes the code.
    """
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    told = ""
    for ptxas in sorted(folder.glob("ptxas*")):  # older GPUs and Blackwell may have their own
        command = [str(ptxas), "-arch=sm_90a", "-v", "-o", "/dev/null", "/dev/stdin"]
        done = subprocess.run(command, input=ptx, capture_output=True, text=True)
        told += done.stdout + done.stderr
        if done.returncode == 0:
            return "serialized" in done.stdout + done.stderr
    raise RuntimeError(f"no ptxas in {folder} takes the code: {told[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="such as sm_80, sm_90 or gfx942")
    parser.add_argument("--all", action="store_true", help="float32 and all head dims and blocks")
    parser.add_argument("--gluon", action="store_true", help="the Gluon kernel instead, for sm_90")
    parser.add_argument("--only", action="append", help="again for each name; default: all")
    arguments = parser.parse_args()

    if arguments.target.startswith("sm_"):
        target = GPUTarget("cuda", int(arguments.target[3:]), 32)
    else:
        target = GPUTarget("hip", arguments.target, 64)
    driver.set_active(Driver(target))
    dot.check_device = lambda name, x: None
    dot.has_fast_descriptors = lambda device: target.arch in (90, 100)
    tiles.family = lambda device: tiles.FAMILIES.get(target.arch, "other")

    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    eight_bits = ("int8", "fp8") if target.backend == "cuda" and target.arch >= 89 else ("int8",)
    chosen = list(launches(arguments.all, eight_bits))
    if arguments.gluon:
        chosen = [*gluon_launches(), *gluon_fp8_launches(), *gluon_mass_launches()]
    if arguments.only:
        chosen = [launch for launch in chosen if launch[0] in arguments.only]
    for name, call in chosen:
        compiled.clear()
        call()
        *before, kernel = compiled  # such as means, queries and keys in INT8 before attention
        if before:
            fits = max(before, key=lambda kernel: kernel.metadata.shared)
            print(json.dumps({"kernel": f"before {name}", "shared": fits.metadata.shared}))
        ptx = kernel.asm.get("ptx", "")
        record = {
            "kernel": name,
            "shared": kernel.metadata.shared,
            "wgmma": ptx.count("wgmma.mma_async"),
            "tma": ptx.count("cp.async.bulk.tensor"),
        }
        if arguments.gluon:
            record["serialized"] = is_serialized(ptx)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
