"""Load a pipeline from a folder or the hub, choose its device, know how it wants to be called."""

import inspect
import json
import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from .metrics import torchvision_problem
from .pipelines.family import families

# Small trained pipelines that come along, the first by default; the last is a LoRA for 4 steps.
BOXES = "wan_tiny", "hunyuan_video_tiny", "cogvideox_tiny", "wan_tiny_lora"
CALL_FILE = "dit_sparse.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
CALL_ARGUMENTS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
DEFAULT_FPS = 16
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class CallArguments:
    """How to call a pipeline: keyword arguments, frames per second, prompts, committed figures.

    `measured` lists what was measured with which call: `call`, `noise_floor`, `chance`.
    """

    call: dict[str, Any]
    fps: float = DEFAULT_FPS
    prompts: tuple[str, ...] = ()
    measured: tuple[dict[str, Any], ...] = ()

    def override(self, **changes: Any) -> "CallArguments":
        """The same with every change that is not None."""
        changes = {name: value for name, value in changes.items() if value is not None}
        return replace(self, call={**self.call, **changes})

    @property
    def noise_floor(self) -> dict[str, Any] | None:
        return self._figure("noise_floor")

    @property
    def chance(self) -> dict[str, Any] | None:
        return self._figure("chance")

    def _figure(self, name: str) -> dict[str, Any] | None:
        """A committed figure, if it was measured with exactly this call."""
        return next((entry[name] for entry in self.measured if entry["call"] == self.call), None)


def boxed_pipeline(name: str = BOXES[0]) -> Path:
    """Folder of a small trained pipeline that comes along, in a checkout or an installed wheel.

    Raises:
        FileNotFoundError: this installation has none of that name.
    """
    package, box = Path(__file__).parent, Path("samples") / name
    for root in (package, package.parent):
        if (root / box / CALL_FILE).is_file():
            return root / box
    raise FileNotFoundError(
        f"the small pipeline {name} is not in this installation. Name one with --pipeline: "
        "a folder with model_index.json, or a hub id"
    )


def find_pipeline(source: str | Path | None) -> str | Path:
    """The folder that is meant, else the hub id: a box by its name, the first one by None."""
    if source is None:
        return boxed_pipeline()
    path = Path(source).expanduser()
    if not path.exists() and str(source) in BOXES:
        return boxed_pipeline(str(source))
    return path if path.exists() else source


def choose_device(name: str | None = None) -> str:
    """`name` if it can be used, else "cuda" where there is one, else "cpu".

    Raises:
        ValueError: a GPU was asked for and is not there, or the name is not a device.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"--device must be like cpu, cuda or cuda:1, got {name!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        build = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        raise ValueError(f"--device {name}: {build}. Use --device cpu, or install torch for CUDA")
    if kind == "cuda" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs here")
    return name


def choose_dtype(name: str | None, device: str) -> torch.dtype:
    """The dtype called `name`; by default bfloat16 on a GPU and float32 on a CPU."""
    if name is None:
        return torch.float32 if device == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def load_pipeline(
    source: str | Path | None, device: str, dtype: torch.dtype, quiet: bool = True
) -> Any:
    """Load a diffusers pipeline and put it on a device.

    Args:
        source: a folder with model_index.json, a hub id, or the name of a boxed pipeline; None for
            the first of these. A folder of LoRA weights whose `dit_sparse.json` names the folder
            beside it that they belong to, `base`, and their `scheduler`, is loaded on top of it.
        quiet: no progress of loading.

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be had.
        RuntimeError: torchvision is broken (transformers imports it).
    """
    source = find_pipeline(source)
    path = Path(source)
    if all((path / name).is_file() for name in (LORA_FILE, CALL_FILE)):
        return load_with_lora(path, device, dtype, quiet)
    if path.exists() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{source} is no diffusers pipeline: it has no model_index.json. "
            "Name the folder that save_pretrained wrote"
        )
    pipe = from_pretrained(source, dtype, quiet)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def read_call_file(folder: Path) -> dict[str, Any]:
    """What `dit_sparse.json` in a folder says.

    Raises:
        ValueError: it cannot be understood.
    """
    path = folder / CALL_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["call"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not say how to call the pipeline ({error!r})") from error
    return stored


def load_with_lora(folder: Path, device: str, dtype: torch.dtype, quiet: bool) -> Any:
    if not find_spec("peft"):
        raise RuntimeError(f"{folder} is a LoRA and needs peft: pip install 'dit-sparse[lora]'")
    settings = read_call_file(folder)
    pipe = load_pipeline(folder.parent / Path(settings["base"]).name, device, dtype, quiet)
    pipe.load_lora_weights(folder, weight_name=LORA_FILE)
    config = pipe.scheduler.config
    pipe.scheduler = type(pipe.scheduler).from_config(config, **settings["scheduler"])
    return pipe


def from_pretrained(source: str | Path, dtype: torch.dtype, quiet: bool) -> Any:
    try:
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            show = library.utils.logging
            (show.disable_progress_bar if quiet else show.enable_progress_bar)()
        # A VAE that keeps every frame makes WanPipeline say so at every call, whatever is asked.
        wan = logging.getLogger("diffusers.pipelines.wan.pipeline_wan")
        wan.addFilter(says_something)
        renamed = Version(diffusers.__version__) >= Version("0.42.1")
        kwargs = {"dtype" if renamed else "torch_dtype": dtype}
        return diffusers.DiffusionPipeline.from_pretrained(str(source), **kwargs)
    except (ImportError, RuntimeError) as error:
        # transformers imports torchvision where it is installed, and hides why that failed.
        if find_spec("torchvision") and (problem := torchvision_problem()):
            raise RuntimeError(problem) from error
        raise
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise
        raise FileNotFoundError(
            f"no pipeline {str(source)!r}: there is no such folder, and the hub did not give it. "
            "Check the name and the network"
        ) from error


def says_something(record: logging.LogRecord) -> bool:
    return "has to be divisible by 1." not in record.getMessage()


def call_arguments(pipe: Any, source: str | Path | None) -> CallArguments:
    """What `dit_sparse.json` beside the model says; else the pipeline's own defaults."""
    folder = Path(find_pipeline(source))
    known = inspect.signature(pipe.__call__).parameters
    if (folder / CALL_FILE).is_file():
        stored = read_call_file(folder)
        return CallArguments(
            call=stored["call"],
            fps=stored.get("fps", DEFAULT_FPS),
            prompts=tuple(stored.get("prompts", ())),
            measured=tuple(stored.get("measured", ())),
        )
    call = {name: known[name].default for name in CALL_ARGUMENTS if name in known}
    fps = [family.fps for family in families() if type(pipe).__name__ in family.pipelines]
    return CallArguments(
        call={name: value for name, value in call.items() if value is not None},
        fps=fps[0] if fps else DEFAULT_FPS,
    )
