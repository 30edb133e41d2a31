"""Run a function in two processes that can talk to one another (gloo on the CPU)."""

import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two(folder: Path, function, *args) -> list:
    """What `function(rank, *args)` returns on each. Forked: nothing is imported again."""
    if torch.cuda.is_available():
        pytest.skip("a process that is forked cannot use the GPU that is here")
    for file in folder.glob("of_two_*"):
        file.unlink()
    mp.start_processes(_one, (folder, function, args), nprocs=2, start_method="fork")
    return [torch.load(folder / f"of_two_{rank}.pt", weights_only=False) for rank in range(2)]


def as_launched(rank: int) -> None:
    """Set what `accelerate launch` tells a process."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _one(rank: int, folder: Path, function, args) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    store = dist.FileStore(str(folder / "of_two_store"), 2)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    try:
        torch.save(function(rank, *args), folder / f"of_two_{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    if dist.is_initialized():  # the function may have ended it
        dist.barrier()
        dist.destroy_process_group()
