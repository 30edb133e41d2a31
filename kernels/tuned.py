"""Tiles that `dit-sparse bench --tune` found fastest on this GPU, in the user's cache folder.

One JSON file, `tiles.json`: GPU and Triton version -> problem -> tile. It is read once a process.
The folder is the platform's own, or that of the environment variable DIT_SPARSE_CACHE.
"""

import functools
import json
import logging
import os
from pathlib import Path

import torch
import triton
from platformdirs import user_cache_path

from .tiles import Tile

logger = logging.getLogger(__name__)


def tiles_file() -> Path:
    folder = os.environ.get("DIT_SPARSE_CACHE")
    return (Path(folder) if folder else user_cache_path("dit-sparse")) / "tiles.json"


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}"


def problem(path: str, head_dim: int, block_size: tuple[int, int]) -> str:
    return f"forward, {path}, head dim {head_dim}, blocks {block_size[0]}x{block_size[1]}"


def keep(device: torch.device, name: str, tile: Tile) -> Path:
    """Write a tile beside the others and use it from now on."""
    file = tiles_file()
    found = read(file)
    found.setdefault(machine(device), {})[name] = list(tile)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)
    tuned_tile.cache_clear()
    return file


def read(file: Path) -> dict[str, dict[str, list]]:
    """What the file holds; nothing, with a warning, where it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert all(len(Tile(*tile)) == 5 for tiles in found.values() for tile in tiles.values())
    except FileNotFoundError:
        return {}
    except Exception as error:
        logger.warning(
            "%s is not used (%s: %s); `dit-sparse bench --tune` writes it again",
            file,
            type(error).__name__,
            error,
        )
        return {}
    return found


@functools.cache
def tuned_tile(device: torch.device, name: str) -> Tile | None:
    """The tile that was found for a problem on this GPU, None where none was."""
    tile = read(tiles_file()).get(machine(device), {}).get(name)
    return None if tile is None else Tile(*tile)
