"""Dense against sparse: the same prompts, seeds and noise, measured and put side by side.

Writes into a folder: `videos/` (mp4 and gif), `frames/` (lossless WebP), `sheets/` (PNG),
`traces/` (density and kept mass per branch, step, layer and head; block maps of the first clip),
`report.json`, schema 1, and at the end `report.html`. report.json is written again after every
clip, so that an interrupted comparison keeps all that it finished. Several processes share the
prompts and seeds, keep a record of each clip in `records/`, and the first writes both at the end.
"""

import copy
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from .generation import (
    Clip,
    check_call,
    enable,
    generate_clip,
    prepare_folder,
    tell_replaced,
    write_json,
)
from .loading import CallArguments
from .method_spec import MethodSpec, refuse_repeats
from .metrics import ClipMetrics, Lpips, compare_clips
from .page import write_page
from .processes import Processes, Records
from .progress import Steps
from .read_video import read_video
from .video import whole_file, write_frames, write_gif, write_mp4, write_sheet

SCHEMA = 1
PACKAGES = ("dit-sparse", "torch", "diffusers", "transformers", "triton", "torchmetrics")
# First steps compile kernels on a GPU; neither side should pay for that in its seconds.
WARM_UP_STEPS = 5


@dataclass
class Comparison:
    """What to compare; `run` does it.

    Args:
        pipe: a loaded pipeline. Afterwards it is as it was.
        source: its folder or hub id, for the report.
        arguments: how to call it.
        methods: sparse methods, each with its options.
        measure: also measure the kept mass.
        measure_floor: measure noise floor and chance here instead of reading committed figures.
    """

    pipe: Any
    source: str
    arguments: CallArguments
    prompts: Sequence[str]
    seeds: Sequence[int]
    methods: Sequence[MethodSpec]
    out: Path
    lpips: Lpips | None = None
    measure: bool = True
    measure_floor: bool = False
    quiet: bool = False
    processes: Processes = field(default_factory=Processes)
    report: dict[str, Any] = field(default_factory=dict, init=False)

    def prepare(self) -> None:
        """Refuse what cannot work, before minutes are spent on it.

        Raises:
            ValueError, TypeError: prompts, seeds, methods, options or arguments that do not fit.
            UnsupportedPipelineError: no sparse attention for this pipeline.
            PermissionError: the output folder cannot be written.
        """
        for name in ("prompts", "seeds", "methods"):
            if not getattr(self, name):
                raise ValueError(f"nothing to compare: no {name}, give --{name[:-1]}")
        refuse_repeats(self.methods, self.seeds)
        check_call(self.pipe, self.arguments.call)
        for method in self.methods:
            enable(self.pipe, method).disable()
        self.out = prepare_folder(self.out)
        for folder in ("videos", "frames", "sheets", "traces"):
            prepare_folder(self.out / folder)
        if not self.processes.several:
            tell_replaced([self.out / "report.json"])

    def run(self) -> dict[str, Any]:
        """Generate everything and return the report, which is also in `out/report.json`.

        With several processes each generates its part; the first returns the report of all.
        """
        self.cells = [(p, s) for p in range(len(self.prompts)) for s in self.seeds]
        self.report = self.header()
        same = {name: self.report[name] for name in ("pipeline", "metrics")}
        same |= {"measure": self.measure, "dtype": self.report["environment"]["dtype"]}
        self.records = Records(self.out, self.processes, same)
        own = self.processes.part([cell for cell in self.cells if not self.finished(cell)])
        floor = 3 if on_gpu(self.pipe) else 2
        extra = floor * (self.measure_floor and self.cells[0] in own)
        self.steps = Steps(len(own) * (1 + len(self.methods)) + extra, self.quiet)
        if own:
            self.warm_up()
        for prompt, seed in own:
            self.compare_cell(prompt, seed)
        self.processes.end()
        if self.processes.first:
            self.report["complete"] = True
            self.write()
            write_page([self.out], self.out / "report.html")
        return self.report

    def names(self, prompt: int, seed: int) -> list[str]:
        """Of the clips of one prompt and seed: dense, then every method's."""
        slugs = ["dense", *(method.slug for method in self.methods)]
        return [f"p{prompt:02d}-s{seed}-{slug}" for slug in slugs]

    def recorded(self, prompt: int, names: Sequence[str]) -> list[dict[str, Any]]:
        found = [self.records.find(name, self.prompts[prompt]) for name in names]
        return [record for record in found if record]

    def finished(self, cell: tuple[int, int]) -> bool:
        names = self.names(*cell) + ["floor"] * self.floor_after(cell)
        return len(self.recorded(cell[0], names)) == len(names)

    def floor_after(self, cell: tuple[int, int]) -> bool:
        return self.measure_floor and cell == self.cells[0]

    def header(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "command": shlex.join(["dit-sparse", *sys.argv[1:]]),
            "complete": False,
            "pipeline": {
                "source": self.source,
                "class": type(self.pipe).__name__,
                "call": self.arguments.call,
                "fps": self.arguments.fps,
            },
            "environment": environment(self.pipe),
            "metrics": metrics_in_words(self.lpips),
            "noise_floor": self.arguments.noise_floor,
            "chance": self.arguments.chance,
            "dense": [],
            "runs": [],
        }

    def write(self) -> None:
        names = [(prompt, self.names(prompt, seed)) for prompt, seed in self.cells]
        self.report["dense"] = [r for p, (dense, *_) in names for r in self.recorded(p, [dense])]
        self.report["runs"] = [r for p, (_, *runs) in names for r in self.recorded(p, runs)]
        for floor in self.recorded(0, ["floor"] * self.measure_floor):
            self.report |= {name: floor[name] for name in ("noise_floor", "chance")}
        write_json(self.out / "report.json", self.report)

    def warm_up(self) -> None:
        call = dict(self.arguments.call)
        if not on_gpu(self.pipe) or "num_inference_steps" not in call:
            return
        call["num_inference_steps"] = WARM_UP_STEPS
        self.steps.say("Warming up ...")
        for method in [None, *self.methods]:
            generate_clip(self.pipe, self.prompts[0], 0, call, method, self.measure)

    def generate(self, prompt: int, seed: int, method: MethodSpec | None, label: str) -> Clip:
        steps = self.arguments.call.get("num_inference_steps")
        with self.steps.clip(label, steps) as tick:
            clip = generate_clip(
                self.pipe,
                self.prompts[prompt],
                seed,
                self.arguments.call,
                method,
                self.measure,
                tick,
                maps=(prompt, seed) == self.cells[0],
            )
        self.steps.say(f"{label}: {clip.seconds:.1f} s, prompt {prompt}, seed {seed}")
        return clip

    def compare_cell(self, prompt: int, seed: int) -> None:
        """One prompt and seed: dense once, then every method."""
        dense_id, *run_ids = self.names(prompt, seed)
        exact = self.out / "records" / f"{dense_id}.safetensors"
        dense = self.dense_frames(prompt, seed, dense_id, exact)
        shown: list[tuple[str, np.ndarray]] = []
        sheet = f"sheets/p{prompt:02d}-s{seed}.png"
        for method, run_id in zip(self.methods, run_ids):
            if self.recorded(prompt, [run_id]):
                earlier = read_video(self.out / "frames" / run_id)
                shown.append((method.text, earlier.frames))
                continue
            clip = self.generate(prompt, seed, method, method.text)
            with self.steps.bar(f"metrics of {method.text}", len(clip.frames)) as tick:
                metrics = compare_clips(dense, clip.frames, self.lpips, tick)
            record = self.run_record(prompt, seed, method, clip, metrics)
            shown.append((method.text, clip.frames))
            write_sheet(self.out / sheet, dense, shown)
            self.keep(run_id, record | {"sheet": sheet})
        if self.floor_after((prompt, seed)):
            self.measure_floor_and_chance(dense)
        exact.unlink(missing_ok=True)

    def dense_frames(self, prompt: int, seed: int, name: str, exact: Path) -> np.ndarray:
        """Generated, or what an interrupted run left in the file `exact`."""
        if exact.is_file() and self.recorded(prompt, [name]):
            return load_file(exact)["frames"]
        clip = self.generate(prompt, seed, None, "dense")
        self.records.forget(name)
        record = {
            "id": name,
            "prompt": self.prompts[prompt],
            "seed": seed,
            "seconds": clip.seconds,
            "peak_bytes": clip.peak_bytes,
            **self.save_clip(name, clip.frames),
        }
        if self.processes.several:
            with whole_file(exact) as part:
                save_file({"frames": np.ascontiguousarray(clip.frames)}, part)
        self.keep(name, record)
        return clip.frames

    def keep(self, name: str, record: dict[str, Any]) -> None:
        self.records.add(name, record)
        if not self.processes.several:
            self.write()

    def run_record(
        self, prompt: int, seed: int, method: MethodSpec, clip: Clip, metrics: ClipMetrics
    ) -> dict[str, Any]:
        sparse, call = clip.sparse, self.arguments.call
        run_id = f"p{prompt:02d}-s{seed}-{method.slug}"
        self.records.forget(run_id)
        trace = f"traces/{run_id}.json"
        stored = {"schema": SCHEMA, "id": run_id, "trace": sparse.trace, "maps": sparse.maps}
        write_json(self.out / trace, stored)
        return {
            "id": run_id,
            "dense_id": f"p{prompt:02d}-s{seed}-dense",
            "method": sparse.method,
            "label": method.text,
            "config": sparse.config,
            "prompt": self.prompts[prompt],
            "seed": seed,
            "steps": sparse.steps,
            "guidance": call.get("guidance_scale"),
            "size": list(clip.frames.shape[:3]),  # frames, height, width in pixels
            "density": sparse.density,
            "effective_cost": sparse.effective_cost,
            "kept_mass": sparse.kept_mass,
            "seconds": clip.seconds,
            "peak_bytes": clip.peak_bytes,
            "peak_cache_bytes": sparse.peak_cache_bytes,
            "notes": list(sparse.notes),
            **metrics.as_dict(),
            **self.save_clip(run_id, clip.frames),
            "trace": trace,
        }

    def save_clip(self, name: str, frames: np.ndarray) -> dict[str, str]:
        write_mp4(self.out / "videos" / f"{name}.mp4", frames, self.arguments.fps)
        write_gif(self.out / "videos" / f"{name}.gif", frames, self.arguments.fps)
        write_frames(self.out / "frames" / name, frames)
        return {"video": f"videos/{name}.mp4", "frames": f"frames/{name}"}

    def measure_floor_and_chance(self, dense: np.ndarray) -> None:
        """More dense runs of the first prompt: other numerics, and another seed."""
        prompt, seed = self.cells[0]
        kernels, first, second = self.floor_runs(prompt, seed, dense)
        floor = compare_clips(first, second, self.lpips).as_dict()
        clip = self.generate(prompt, seed + 1, None, "dense, another seed")
        chance = compare_clips(dense, clip.frames, self.lpips).as_dict()
        record = {
            "prompt": self.prompts[prompt],
            "noise_floor": {**floor, "kernels": kernels, "clips": 1},
            "chance": {**chance, "seeds": [seed, seed + 1], "clips": 1},
        }
        self.keep("floor", record)

    def floor_runs(
        self, prompt: int, seed: int, dense: np.ndarray
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The same clip by two attention kernels (GPU), or in bfloat16 too (CPU)."""
        if on_gpu(self.pipe):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                first = self.generate(prompt, seed, None, "dense, cuDNN")
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                second = self.generate(prompt, seed, None, "dense, FlashAttention-2")
            return ["cuDNN", "FlashAttention-2"], first.frames, second.frames
        names = [n for n in ("transformer", "transformer_2") if getattr(self.pipe, n, None)]
        originals = {name: getattr(self.pipe, name) for name in names}
        try:
            for name, model in originals.items():
                setattr(self.pipe, name, in_bfloat16(model))
            second = self.generate(prompt, seed, None, "dense, bfloat16")
        finally:
            for name, model in originals.items():
                setattr(self.pipe, name, model)
        dtype = str(dtype_of(self.pipe)).removeprefix("torch.")
        return [dtype, "bfloat16"], dense, second.frames


def metrics_in_words(lpips: Lpips | None) -> dict[str, Any]:
    return {
        "psnr": "mean squared error of the whole clip, peak 1",
        "ssim": "per frame, Gaussian 11, sigma 1.5, averaged",
        "lpips_net": lpips.net if lpips else None,
        "lpips_missing": lpips.reason if lpips else "not asked for",
    }


def in_bfloat16(model: torch.nn.Module) -> torch.nn.Module:
    """A copy as `from_pretrained` in bfloat16 gives it: the layers that diffusers names stay."""
    low = copy.deepcopy(model)
    float32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in low.named_parameters():
        if not float32 & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return low


def on_gpu(pipe: Any) -> bool:
    return torch.device(pipe.device).type == "cuda"


def dtype_of(pipe: Any) -> torch.dtype:
    return (getattr(pipe, "transformer", None) or pipe.transformer_2).dtype


def environment(pipe: Any) -> dict[str, Any]:
    """Versions and hardware that the figures depend on."""
    device = torch.device(pipe.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        **software(),
        "device": str(device),
        "gpu": gpu,
        "cpu_threads": torch.get_num_threads(),
        "dtype": str(dtype_of(pipe)).removeprefix("torch."),
    }


def software() -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
    }


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
