"""A small finished comparison, made without a model: two clips, three methods, hostile words."""

import json
from pathlib import Path

import numpy as np
import torch

from dit_sparse.block_map import pack_maps
from dit_sparse.block_mask import BlockMask
from dit_sparse.metrics import compare_clips
from dit_sparse.video import write_frames

FRAMES, HEIGHT, WIDTH = 8, 32, 48
STEPS, LAYERS, HEADS = 5, 3, 4
HOSTILE = "</script><img src=x onerror=alert(1)> & 'quoted' \"twice\" %SCRIPT%"
LABELS = ("adaspa:density=0.5", "window", "adaspa:density=1.0")
BOUND = {"ssim": 0.9, "lpips": None, "clips": 1}


def tiny_frames(seed: int) -> np.ndarray:
    """Frame number t has a red value of 20 t in its left half."""
    noise = np.random.default_rng(seed).integers(0, 40, (FRAMES, HEIGHT, WIDTH, 3))
    noise[:, :, : WIDTH // 2, 0] = 20 * np.arange(FRAMES)[:, None, None]
    noise[:, :, WIDTH // 2 :, 1] += 120
    return noise.astype(np.uint8)


def tiny_trace(label: str) -> dict:
    full = label.endswith("1.0")
    trace = []
    for step in range(STEPS):
        kind = "dense" if full or step == 0 else "search" if step == 1 else "reuse"
        density = [0.2 + 0.1 * head for head in range(HEADS)] if kind == "reuse" else None
        mass = [0.9 + 0.02 * head for head in range(HEADS)] if kind != "dense" else None
        for branch in ("cond", "uncond"):
            for layer in range(LAYERS):
                entry = {"branch": branch, "step": step, "layer": layer, "kind": kind}
                trace.append({**entry, "density": density, "kept_mass": mass})
    maps = []
    for layer in range(0 if full else LAYERS):
        mask = torch.rand(1, HEADS, 10, 10) < 0.3 + 0.2 * layer
        packed = pack_maps(BlockMask.from_dense(mask | torch.eye(10).bool(), 640, 640))
        maps.append({"branch": "cond", "layer": layer, "step": 1, **packed})
    return {"schema": 1, "id": label, "trace": trace, "maps": maps}


def save_tiny_report(folder: Path) -> Path:
    """Write `report.json`, frames and traces as `compare` does."""
    torch.manual_seed(0)
    (folder / "traces").mkdir(parents=True)
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    report = {
        "schema": 1,
        "command": f"dit-sparse compare --prompt {HOSTILE!r}",
        "complete": True,
        "pipeline": {"source": "tiny", "class": "WanPipeline", "call": call, "fps": 20},
        "environment": {"device": "cpu", "dtype": "float32", "packages": {"torch": "2"}},
        "metrics": {"psnr": "mse", "ssim": "11", "lpips_net": None, "lpips_missing": HOSTILE},
        "noise_floor": {**BOUND, "psnr": 40.0, "kernels": ["float32", "bfloat16"]},
        "chance": {**BOUND, "psnr": 12.0},
        "dense": [],
        "runs": [],
    }
    for number, prompt in enumerate((HOSTILE, "a blue square")):
        dense = tiny_frames(number)
        dense_id = f"p{number:02d}-s0-dense"
        write_frames(folder / "frames" / dense_id, dense)
        about = {"prompt": prompt, "seed": 0}
        place = {"id": dense_id, "frames": f"frames/{dense_id}", "seconds": 2.0}
        report["dense"].append({**about, **place, "peak_bytes": 2**30})
        for shift, label in enumerate(LABELS):
            report["runs"].append(
                {**about, "dense_id": dense_id, **tiny_run(folder, number, label, dense, shift)}
            )
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def tiny_run(folder: Path, number: int, label: str, dense: np.ndarray, shift: int) -> dict:
    run_id = f"p{number:02d}-s0-{shift}"
    full = label.endswith("1.0")
    frames = dense.copy()
    if not full:
        frames[:, 4 : 12 + 4 * shift, 30:40] += 30 + 20 * shift
    write_frames(folder / "frames" / run_id, frames)
    trace = f"traces/{run_id}.json"
    (folder / trace).write_text(json.dumps(tiny_trace(label)))
    return {
        "id": run_id,
        "method": label.partition(":")[0],
        "label": label,
        "config": {"density": 0.5, "search_at": [0.2]},
        "steps": STEPS,
        "guidance": 3.0,
        "size": [FRAMES, HEIGHT, WIDTH],
        "density": 1.0 if full else 0.35,
        "effective_cost": 1.0 if full else 0.5 + 0.1 * shift,
        "kept_mass": None if full else 0.93,
        "seconds": 1.5 + shift,
        "peak_bytes": 2**30,
        "peak_cache_bytes": 2**20,
        "notes": [HOSTILE],
        **compare_clips(dense, frames).as_dict(),
        "video": None,
        "frames": f"frames/{run_id}",
        "trace": trace,
    }
