"""Dense against sparse: the same prompts, seeds and noise, measured and put side by side.

Writes into a folder: `videos/` (mp4 and gif), `frames/` (lossless WebP), `sheets/` (PNG),
`traces/` (density and kept mass per branch, step, layer and head; block maps of the first clip),
`report.json`, schema 1, and at the end `report.html`. report.json is written again after every
clip, so that an interrupted comparison keeps all that it finished.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from .generation import Clip, check_call, enable, generate_clip, prepare_folder, write_json
from .loading import CallArguments
from .method_spec import MethodSpec, refuse_repeats
from .metrics import ClipMetrics, Lpips, compare_clips
from .page import write_page
from .progress import Steps
from .video import write_frames, write_gif, write_mp4, write_sheet

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

    def run(self) -> dict[str, Any]:
        """Generate everything and return the report, which is also in `out/report.json`."""
        cells = [(p, s) for p in range(len(self.prompts)) for s in self.seeds]
        extra = 3 if self.measure_floor and on_gpu(self.pipe) else 2 * self.measure_floor
        self.steps = Steps(len(cells) * (1 + len(self.methods)) + extra, self.quiet)
        self.report = self.header()
        self.warm_up()
        for number, (prompt, seed) in enumerate(cells):
            dense = self.compare_cell(prompt, seed)
            if number == 0 and self.measure_floor:
                self.measure_floor_and_chance(dense)
        self.report["complete"] = True
        self.write()
        write_page([self.out], self.out / "report.html")
        return self.report

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
                maps=len(self.report["dense"]) == 1,  # of the first prompt and seed
            )
        self.steps.say(f"{label}: {clip.seconds:.1f} s, prompt {prompt}, seed {seed}")
        return clip

    def compare_cell(self, prompt: int, seed: int) -> Clip:
        """One prompt and seed: dense once, then every method."""
        dense = self.generate(prompt, seed, None, "dense")
        dense_id = f"p{prompt:02d}-s{seed}-dense"
        self.report["dense"].append(
            {
                "id": dense_id,
                "prompt": self.prompts[prompt],
                "seed": seed,
                "seconds": dense.seconds,
                "peak_bytes": dense.peak_bytes,
                **self.save_clip(dense_id, dense.frames),
            }
        )
        self.write()
        finished: list[tuple[str, np.ndarray]] = []
        sheet = f"sheets/p{prompt:02d}-s{seed}.png"
        for method in self.methods:
            clip = self.generate(prompt, seed, method, method.text)
            with self.steps.bar(f"metrics of {method.text}", len(clip.frames)) as tick:
                metrics = compare_clips(dense.frames, clip.frames, self.lpips, tick)
            self.report["runs"].append(self.run_record(prompt, seed, method, clip, metrics))
            finished.append((method.text, clip.frames))
            write_sheet(self.out / sheet, dense.frames, finished)
            self.report["runs"][-1]["sheet"] = sheet
            self.write()
        return dense

    def run_record(
        self, prompt: int, seed: int, method: MethodSpec, clip: Clip, metrics: ClipMetrics
    ) -> dict[str, Any]:
        sparse, call = clip.sparse, self.arguments.call
        run_id = f"p{prompt:02d}-s{seed}-{method.slug}"
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

    def measure_floor_and_chance(self, dense: Clip) -> None:
        """More dense runs of the first prompt: other numerics, and another seed."""
        prompt, seed = 0, self.seeds[0]
        kernels, first, second = self.floor_runs(prompt, seed, dense)
        metrics = compare_clips(first, second, self.lpips).as_dict()
        self.report["noise_floor"] = {**metrics, "kernels": kernels, "clips": 1}
        clip = self.generate(prompt, seed + 1, None, "dense, another seed")
        metrics = compare_clips(dense.frames, clip.frames, self.lpips).as_dict()
        self.report["chance"] = {**metrics, "seeds": [seed, seed + 1], "clips": 1}
        self.write()

    def floor_runs(
        self, prompt: int, seed: int, dense: Clip
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
        return [dtype, "bfloat16"], dense.frames, second.frames


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
