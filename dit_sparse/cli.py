"""The command line: `dit-sparse generate`, `compare`, `compare-videos`, `report`, `calibrate`,
`profile`, `methods`, `doctor`, `bench`.

torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .config_file import use_config
from .failure import FAILURE, USAGE, output_told, told

if TYPE_CHECKING:
    from .compare import Comparison
    from .loading import CallArguments
    from .method_spec import MethodSpec
    from .processes import Records

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Training-free sparse attention for video diffusion transformers in diffusers.",
    epilog="Exit codes: 0 done, 1 failed while it ran, 2 refused before it ran, 130 interrupted.",
)


def in_64_bits(seeds: list[int] | int | None) -> list[int] | int:
    """One seed or several, of which torch takes no larger ones."""
    seeds = [] if seeds is None else seeds  # older versions of typer count them afterwards
    for seed in [seeds] if isinstance(seeds, int) else seeds:
        if not -(2**63) <= seed < 2**64:
            raise typer.BadParameter(f"a seed has at most 64 bits, got {seed}")
    return seeds


Pipeline = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        "-p",
        help="Folder, hub id, or a small one that comes along: wan_tiny (without it), "
        "hunyuan_video_tiny, cogvideox_tiny, wan_tiny_lora.",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-m",
        help="NAME or NAME:OPTION=VALUE,... such as adaspa:density=0.1. Repeatable. "
        "A NAME that ends in .py is a file with a rule of your own, in .json a preset.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="What to show; the small ones bring some. Repeatable."),
]
PromptFile = Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", help="Repeatable; without it 0.", callback=in_64_bits),
]
Seed = Annotated[int, typer.Option(help="Of the noise.", callback=in_64_bits)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="The pipeline's num_frames.")]
Device = Annotated[str | None, typer.Option(help="Without it cuda where there is one, else cpu.")]
Dtype = Annotated[str | None, typer.Option(help="Without it bfloat16 on a GPU, float32 on a CPU.")]
LpipsWeights = Annotated[
    Path | None, typer.Option(help="TORCH_HOME folder that holds torchvision's weights.")
]
LpipsNet = Annotated[str, typer.Option(help="alex or vgg.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file with any of these options: steps = 10. Flags win.",
        callback=use_config,
        is_eager=True,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def compare(
    pipeline: Pipeline = None,
    method: Methods = None,
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    seed: Seeds = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("comparison"),
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
    lpips_weights: LpipsWeights = None,
    lpips_net: LpipsNet = "alex",
    measure: Annotated[bool, typer.Option(help="Measure the kept mass.")] = True,
    measure_floor: Annotated[
        bool, typer.Option("--measure-floor", help="Measure noise floor and chance here.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Dense against sparse, same prompts, seeds and noise: videos, sheets, a table, report.html."""
    with told(USAGE, debug):
        from .compare import Comparison
        from .loading import choose_device
        from .method_spec import refuse_repeats
        from .metrics import Lpips
        from .processes import Processes

        lpips = Lpips(lpips_weights, lpips_net)
        specs, seeds = parse_methods(method), seed or [0]
        refuse_repeats(specs, seeds)
        given = read_prompts(prompt, prompt_file)
        changes = call_changes(steps, guidance, height, width, frames)
        processes, device = Processes.joined(choose_device(device))
        quiet = quiet or not processes.first
        pipe, arguments = open_pipeline(pipeline, device, dtype, changes, quiet)
        comparison = Comparison(
            pipe=pipe,
            source=pipeline or "samples/wan_tiny (boxed)",
            arguments=arguments,
            prompts=given or arguments.prompts[:1],
            seeds=seeds,
            methods=specs,
            out=out,
            lpips=lpips,
            measure=measure,
            measure_floor=measure_floor,
            quiet=quiet,
            processes=processes,
        )
        comparison.prepare()
    with told(FAILURE, debug, lambda: kept_by(comparison)):
        report = comparison.run()
    if not processes.first:
        return
    if as_json:
        print(json.dumps(report))
        return
    show_comparison(report, out)


@app.command("report")
def rebuild_report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `compare` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; without it report.html, in a lone FOLDER."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One page, report.html, from one or several finished comparisons."""
    with told(USAGE, debug):
        from .generation import prepare_file
        from .page import page_text, save_page

        out = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
        text, page = page_text(folders), prepare_file(out)
    with told(FAILURE, debug):
        save_page(text, page)
    print(json.dumps({"page": str(page)}) if as_json else f"page: {page}")


@app.command("compare-videos")
def compare_finished_videos(
    reference: Annotated[Path, typer.Argument(help="Video file, gif or folder of images.")],
    videos: Annotated[list[Path], typer.Argument(help="What is compared with it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("comparison"),
    lpips_weights: LpipsWeights = None,
    lpips_net: LpipsNet = "alex",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Videos against a reference: the same metrics and page, whatever made them."""
    with told(USAGE, debug):
        from .compare_videos import check_videos, compare_videos
        from .generation import prepare_folder
        from .metrics import Lpips

        lpips = Lpips(lpips_weights, lpips_net)
        folder = prepare_folder(out)
        check_videos(reference, videos, folder)
    with told(FAILURE, debug):
        report = compare_videos(reference, videos, folder, lpips, quiet)
    if as_json:
        print(json.dumps(report))
        return
    show_comparison(report, out)


@app.command()
def generate(
    pipeline: Pipeline = None,
    method: Methods = None,
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    seed: Seeds = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("videos"),
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate videos with sparse attention; `--method dense` leaves the pipeline alone."""
    with told(USAGE, debug):
        from .compare import dtype_of
        from .generation import check_call, enable, prepare_folder, tell_replaced
        from .loading import choose_device
        from .method_spec import DENSE, refuse_repeats
        from .processes import Processes, Records

        specs, seeds = parse_methods(method, allow_dense=True), seed or [0]
        refuse_repeats(specs, seeds)
        given = read_prompts(prompt, prompt_file)
        changes = call_changes(steps, guidance, height, width, frames)
        processes, device = Processes.joined(choose_device(device))
        quiet = quiet or not processes.first
        pipe, arguments = open_pipeline(pipeline, device, dtype, changes, quiet)
        prompts = some_prompts(given, arguments, 1)
        check_call(pipe, arguments.call)
        for spec in specs:
            if spec.name != DENSE:
                enable(pipe, spec).disable()
        folder = prepare_folder(out)
        settings = {"pipeline": pipeline, "dtype": str(dtype_of(pipe)), "fps": arguments.fps}
        records = Records(folder, processes, settings | {"call": arguments.call})

    def kept() -> str:
        return f"{len(records.here)} finished videos are in {folder}." if records.here else ""

    with told(FAILURE, debug, kept):
        clips = [
            (f"p{p:02d}-s{s}-{spec.slug}", text, s, spec)
            for p, text in enumerate(prompts)
            for s in seeds
            for spec in specs
        ]
        left = [clip for clip in clips if not records.find(*clip[:2])]
        if processes.first:
            tell_replaced(folder / f"{name}.mp4" for name, *_ in left)
        own = processes.part(left)
        generate_all(pipe, arguments, own, folder, quiet, as_json, records)
        processes.end()
    if as_json and processes.first:
        print(json.dumps([records.find(*clip[:2]) for clip in clips]))


@app.command("calibrate")
def calibrate_modes(
    pipeline: Pipeline = None,
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    method: Annotated[str, typer.Option(help="sparse-vdit or seerattention.")] = "sparse-vdit",
    density: Annotated[float | None, typer.Option(help="Of the sparse modes, 0.2.")] = None,
    order: Annotated[
        str | None, typer.Option(help="Of tokens: curve, tile, patch or raster.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="32, 64 or 128.")] = 64,
    weight: Annotated[
        float | None, typer.Option(help="Of density against error (lambda), 0.5.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Above it a head stays dense, 0.25.")
    ] = None,
    updates: Annotated[int | None, typer.Option(help="Of a gate at each call, 10.")] = None,
    psnr: Annotated[
        float | None,
        typer.Option(help="In dB: find the cheapest auto that is so near to dense, a preset."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file; without it one named for what it holds."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search the modes of `sparse-vdit`, distil the gates of `seerattention`, or find a preset."""
    if psnr is not None:
        with told(USAGE, debug):
            from .config import positive
            from .generation import prepare_file, tell_replaced

            only_auto = method, density, order, block_size, weight, epsilon, updates
            if only_auto != ("sparse-vdit", None, None, 64, None, None, None):
                raise ValueError("--psnr tries settings of auto: leave the options of methods out")
            positive("--psnr", psnr)
            given = read_prompts(prompt, prompt_file)
            changes = call_changes(steps, guidance, height, width, frames)
            pipe, call, prompts = open_run(pipeline, device, dtype, changes, given, 2, quiet)
            out = prepare_file(out or Path("preset.json"))
            tell_replaced([out])
        with told(FAILURE, debug):
            clips = [(prompt, seed) for prompt in prompts]
            save_preset(pipe, call, clips, psnr, out, as_json, quiet)
        return
    with told(USAGE, debug):
        from .calibrate import ModeSearch, calibrate
        from .distil import Distillation, distil
        from .generation import prepare_file, tell_replaced

        if method not in ("sparse-vdit", "seerattention"):
            raise ValueError(f"only sparse-vdit and seerattention are calibrated, got {method!r}")
        gated = method == "seerattention"
        of_modes = {"density": density, "weight": weight, "epsilon": epsilon}
        for name, value in (of_modes if gated else {"updates": updates}).items():
            if value is not None:
                raise ValueError(f"--{name} says nothing to {method}")
        of_both: dict[str, Any] = of_modes | {"order": order}
        chosen = {name: value for name, value in of_both.items() if value is not None}
        search = ModeSearch(block_size=block_size, **chosen)
        settings = Distillation(order or "curve", block_size, 10 if updates is None else updates)
        given = read_prompts(prompt, prompt_file)
        changes = call_changes(steps, guidance, height, width, frames)
        pipe, call, prompts = open_run(pipeline, device, dtype, changes, given, 4, quiet)
        named = "seerattention.safetensors" if gated else "sparse_vdit.json"
        out = prepare_file(out or Path(named))
        tell_replaced([out])
    with told(FAILURE, debug):
        run = latent_run(pipe, call, prompts, seed, quiet)
        if gated:
            distil(pipe, run, settings).save(out)
            told_gates = {"gates": str(out), "divergences": settings.divergences}
            print(json.dumps(told_gates) if as_json else f"{out}: {settings.progress()}")
            return
        table = calibrate(pipe, run, search, len(prompts))
        table.save(out)
    from .patterns.sparse_vdit import MODES

    digits = "".join(row for branch in table.modes.values() for rows in branch for row in rows)
    shares = {name: digits.count(str(i)) / len(digits) for i, name in enumerate(MODES)}
    if as_json:
        print(json.dumps({"table": str(out), "shares": shares}))
        return
    print(f"{out}: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}")


def save_preset(
    pipe: Any,
    call: dict[str, Any],
    clips: list[tuple[str, int]],
    psnr: float,
    out: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    from .compare import environment
    from .preset import find_preset
    from .progress import Steps

    preset, trials = find_preset(pipe, call, clips, psnr, Steps(1, quiet).say)
    if preset is None:
        raise ValueError(
            f"no setting of auto that is cheaper than dense reaches {psnr:g} dB here (tried up to"
            f" cost {trials[-1].effective_cost:.2f}, {trials[-1].psnr:.1f} dB): generate densely"
        )
    preset.evidence |= {"pipeline": type(pipe).__name__, "environment": environment(pipe)}
    preset.save(out)
    told = {"preset": str(out), "options": preset.options}
    print(json.dumps(told) if as_json else f"{out}: use it as --method {out}")


@app.command("profile")
def profile_attention(
    pipeline: Pipeline = None,
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file.")] = Path("profile.json"),
    two: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Two such files side by side; nothing is generated."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a pipeline's attention in one dense generation: the fingerprint of a model."""
    with told(USAGE, debug):
        from .compare import environment
        from .fingerprint import compare_profiles
        from .generation import prepare_file, tell_replaced
        from .look import profile

        if two is not None:
            show_figures(compare_profiles(*two), [path.stem for path in two], as_json)
            return
        given = read_prompts(prompt, prompt_file)
        changes = call_changes(steps, guidance, height, width, frames)
        pipe, call, prompts = open_run(pipeline, device, dtype, changes, given, 1, quiet)
        out = prepare_file(out)
        tell_replaced([out])
    with told(FAILURE, debug):
        found = profile(
            pipe,
            latent_run(pipe, call, prompts, seed, quiet),
            pipeline=pipeline or "samples/wan_tiny (boxed)",
            call=call | {"prompts": prompts, "seed": seed},
            environment=environment(pipe),
        )
        found.save(out)
    figures = {name: [value] for name, value in found.figures().items()}
    show_figures(figures, [str(out)], as_json)


@app.command("methods")
def list_methods(as_json: Json = False, debug: Debug = False) -> None:
    """The sparse methods, what they are, and their options with defaults."""
    with told(FAILURE, debug):
        from dataclasses import fields

        from . import available_methods
        from .patterns.left_out import LEFT_OUT

        rows: list[dict[str, Any]] = [
            {
                "method": name,
                "summary": (config.__doc__ or "").strip().split("\n")[0],
                "paper": config.paper,
                "cost": config.cost,
                "memory": config.memory,
                "options": {field.name: field.default for field in fields(config)},
            }
            for name, config in available_methods().items()
        ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        options = "  ".join(f"{name}={value}" for name, value in row["options"].items())
        print(f"{row['method']}: {row['summary']}")
        print(f"    {options}")
        for fact in ("paper", "cost", "memory"):
            print(f"    {fact}: {row[fact]}")
    print("not here:")
    for name, reason in LEFT_OUT.items():
        print(f"    {name}: {reason}")


@app.command("bench")
def bench_attention(
    shape: Annotated[
        str | None,
        typer.Option(help="small, wan-1.3b-480p, wan-14b-720p, hunyuanvideo-720p, cogvideox-5b."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="In place of the shape's.")] = None,
    heads: Annotated[int | None, typer.Option(help="In place of the shape's.")] = None,
    dim: Annotated[int | None, typer.Option(help="Of a head, in place of the shape's.")] = None,
    density: Annotated[float, typer.Option(help="Share of blocks that are read.")] = 0.2,
    block_size: Annotated[int, typer.Option(help="32, 64 or 128.")] = 64,
    precision: Annotated[str, typer.Option(help="Of sparse calls: full, int8 or fp8.")] = "full",
    tune: Annotated[
        bool, typer.Option("--tune", help="Time tiles instead, keep the fastest for this GPU.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time attention calls here: the fastest dense one, each engine's sparse one, the search."""
    with told(USAGE, debug):
        from .bench import SHAPES, bench, summary
        from .config import SparseConfig
        from .loading import choose_device, choose_dtype
        from .tune import refuse_without_gpu
        from .tune import tune as tune_tiles

        device = choose_device(device)
        name = shape or ("small" if device == "cpu" else "wan-1.3b-480p")
        if name not in SHAPES:
            raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {name!r}")
        given = {"tokens": tokens, "heads": heads, "dim": dim}
        for option, number in given.items():
            if number is not None and number < 1:
                raise ValueError(f"--{option} must be at least 1, got {number}")
        size = SHAPES[name]._replace(**{k: v for k, v in given.items() if v is not None})
        SparseConfig(density=density, block_size=block_size, precision=precision)  # checks
        kind = choose_dtype(dtype, device)
        if tune:
            refuse_without_gpu()
    with told(FAILURE, debug):
        if tune:
            told_tiles = tune_tiles(size, density, block_size)
            lines = [f"{key}: {value}" for key, value in told_tiles.items()]
            print(json.dumps(told_tiles) if as_json else "\n".join(lines))
            return
        options = density, block_size, precision
        rows = summary(list(bench(size, *options, device, kind)), size, density)
    if as_json:
        print(json.dumps({"shape": size._asdict(), "density": density, "rows": rows}))
        return
    print(f"{size.tokens} tokens, {size.heads} heads of {size.dim}, {kind}, density {density:g}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "", "ms", "TFLOP/s", "of fastest dense"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for row in rows:
        figures = row.get("error", "-"), "", ""
        if row["seconds"]:
            rate = f"{row['tflops']:.3g}" if "tflops" in row else ""
            figures = f"{row['seconds'] * 1e3:.3g}", rate, f"{1 / row['times_dense']:.3f}"
        table.add_row(row["part"], row["name"], *figures)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
    if device == "cpu":
        print("No GPU here: these are times of plain torch. The kernels are Triton's, for GPUs.")


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """What is installed here, which engines run, and what will be used."""
    with told(FAILURE, debug):
        from .doctor import examine

        state = examine()
    if as_json:
        print(json.dumps(state))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in state.items():
        if not isinstance(value, dict):
            table.add_row(name, str(value))
            continue
        for key, text in value.items():
            table.add_row(f"{name}: {key}", str(text))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def parse_methods(texts: list[str] | None, allow_dense: bool = False) -> "list[MethodSpec]":
    from .method_spec import parse_method

    return [parse_method(text, allow_dense) for text in texts or ["auto"]]


def read_prompts(prompts: list[str] | None, path: Path | None) -> list[str]:
    """Prompts of the options, then those of the file; blank lines and lines with # are left out."""
    lines: list[str] = []
    if path is not None:
        try:
            # -sig: editors on Windows put a mark before the first prompt
            lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ValueError(f"cannot read the prompt file {path}: {reason}") from error
        lines = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
        if not lines:
            raise ValueError(f"the prompt file {path} has no prompts: write one a line")
    found = [*(prompts or []), *lines]
    if not all(text.strip() for text in found):
        raise ValueError("a prompt is empty")
    return found


def call_changes(
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
) -> dict[str, Any]:
    """Options by the names that pipelines use."""
    return {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        "num_frames": frames,
    }


def open_pipeline(
    source: str | None,
    device: str | None,
    dtype: str | None,
    changes: dict[str, Any],
    quiet: bool,
) -> "tuple[Any, CallArguments]":
    from .loading import call_arguments, choose_device, choose_dtype, load_pipeline

    device = choose_device(device)
    no_bars = quiet or not sys.stderr.isatty()
    pipe = load_pipeline(source, device, choose_dtype(dtype, device), no_bars)
    return pipe, call_arguments(pipe, source).override(**changes)


def some_prompts(given: list[str], arguments: "CallArguments", count: int) -> list[str]:
    """Those given, else the pipeline's own first ones."""
    prompts = given or list(arguments.prompts[:count])
    if not prompts:
        raise ValueError("nothing to generate: give --prompt or --prompt-file")
    return prompts


def open_run(
    source: str | None,
    device: str | None,
    dtype: str | None,
    changes: dict[str, Any],
    given: list[str],
    count: int,
    quiet: bool,
) -> tuple[Any, dict[str, Any], list[str]]:
    """A pipeline, its checked call and the prompts of one batch."""
    from .generation import check_call

    pipe, arguments = open_pipeline(source, device, dtype, changes, quiet)
    prompts = some_prompts(given, arguments, count)
    check_call(pipe, arguments.call)
    return pipe, arguments.call, prompts


def latent_run(
    pipe: Any, call: dict[str, Any], prompts: list[str], seed: int, quiet: bool = False
) -> Callable[[], None]:
    """Generates one batch, up to its latents."""
    import torch

    from .generation import ticking
    from .progress import Steps

    def run() -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        with Steps(1, quiet).bar("looking at attention", call.get("num_inference_steps")) as tick:
            extra = ticking(pipe, tick)
            pipe(prompts, generator=generator, output_type="latent", **call, **extra)

    return run


def generate_all(
    pipe: Any,
    arguments: "CallArguments",
    clips: list[tuple[str, str, int, "MethodSpec"]],
    folder: Path,
    quiet: bool,
    as_json: bool,
    records: "Records",
) -> None:
    """Generate and save each clip (name, prompt, seed, method)."""
    from .generation import generate_clip
    from .progress import Steps
    from .video import write_gif, write_mp4

    progress = Steps(len(clips), quiet)
    say = progress.say if as_json else print
    for name, prompt, seed, spec in clips:
        with progress.clip(spec.text, arguments.call.get("num_inference_steps")) as tick:
            clip = generate_clip(
                pipe, prompt, seed, arguments.call, spec, measure=False, on_step=tick
            )
        path = folder / f"{name}.mp4"
        records.forget(name)
        write_mp4(path, clip.frames, arguments.fps)
        write_gif(path.with_suffix(".gif"), clip.frames, arguments.fps)
        record = {"video": str(path), "prompt": prompt, "seed": seed, "seconds": clip.seconds}
        records.add(name, record)
        say(f"{path}: {clip.seconds:.1f} s")
        if clip.sparse is not None:
            say(str(clip.sparse))


def kept_by(comparison: "Comparison") -> str:
    if comparison.processes.several:
        return f"Finished videos are in {comparison.out}; the same command makes the rest."
    count = sum(len(comparison.report.get(part, ())) for part in ("dense", "runs"))
    if not count:
        return ""
    return (
        f"{count} finished videos and report.json are in {comparison.out};"
        f" `dit-sparse report {comparison.out}` makes a page of them."
    )


def show_comparison(report: dict[str, Any], out: Path) -> None:
    from .table import print_table

    print_table(report, Console(markup=False))  # names may hold [brackets]
    for sheet in dict.fromkeys(run["sheet"] for run in report["runs"] if run.get("sheet")):
        print(f"sheet:  {out / sheet}")
    print(f"data:   {out / 'report.json'}")
    print(f"page:   {out / 'report.html'}")


def show_figures(figures: dict[str, list[float]], columns: list[str], as_json: bool) -> None:
    """A line for each figure; with two columns their difference, too."""
    if as_json:
        print(json.dumps(figures))
        return
    both = len(columns) == 2
    table = Table("", *columns, *["difference"] * both, box=None)
    for name, values in figures.items():
        cells = [f"{value:.3f}" for value in values]
        table.add_row(name, *cells, *[f"{values[-1] - values[0]:+.3f}"] * both)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def main() -> None:
    # Two tokenizer threads that outlive a fork only print a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with output_told():
        app(prog_name="dit-sparse")


if __name__ == "__main__":
    main()
