"""Run a headline row of a paper: its model, size, steps and schedule, with our re-implementation.

    python samples/reproduce/run.py                                  # all rows
    python samples/reproduce/run.py adaspa-hunyuanvideo --print      # its settings; loads nothing
    python samples/reproduce/run.py adaspa-hunyuanvideo --prompt-file prompts.txt

Each prompt is generated dense and sparse with the same noise; report.html, report.json and the
means beside the paper's come out. The weights are downloaded by diffusers unless --model names a
folder. None of the rows has been run by us: README.md.
"""

import argparse
from pathlib import Path

from rows import ROWS, Row, table

from dit_sparse.api import make_config
from dit_sparse.calibrate import ModeSearch, calibrate
from dit_sparse.cli import latent_run, read_prompts
from dit_sparse.compare import Comparison
from dit_sparse.generation import check_call
from dit_sparse.loading import call_arguments, choose_device, choose_dtype, load_pipeline
from dit_sparse.method_spec import parse_method
from dit_sparse.metrics import Lpips

SIDES = {"height": "height", "width": "width", "frames": "num_frames"}
SIDES |= {"steps": "num_inference_steps"}


def parse_arguments() -> argparse.Namespace:
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("row", nargs="?", choices=ROWS, metavar="ROW")
    add("--print", action="store_true", help="show what would run, and stop")
    add("--model", help="folder or hub id instead of the row's")
    add("--prompt", action="append")
    add("--prompt-file", type=Path, help="one prompt a line")
    add("--seed", type=int, action="append", help="[default: 0]")
    add("--table", help="modes of Sparse-vDiT. [default: searched with the first prompt]")
    for name in SIDES:
        add(f"--{name}", type=int, help="instead of the row's")
    add("--lpips-weights", type=Path, help="TORCH_HOME folder with torchvision's weights")
    add("--out", type=Path, help="folder. [default: reproduce/ROW]")
    return parser.parse_args()


def settings(row: Row, args: argparse.Namespace) -> dict:
    """The row's call, and over it what was given."""
    given = {SIDES[name]: getattr(args, name) for name in SIDES}
    return row.call | {name: value for name, value in given.items() if value is not None}


def show(name: str, row: Row, call: dict) -> None:
    print(f"{name}: not run here")
    print(f"paper      arXiv {row.paper}: {row.published}, {row.gpu}")
    print(f"model      {row.model}, {row.pipeline}, {row.dtype}")
    print(f"call       {call}")
    print(f"scheduler  {row.scheduler or 'as shipped'}")
    print(f"method     {row.method}")
    if "{table}" not in row.method:
        spec = parse_method(row.method)
        print(f"           {make_config(spec.name, spec.options)[0]}")
    print(f"prompts    {row.prompts}")
    if row.note:
        print(f"note       {row.note}")


def load(row: Row, model: str):
    device = choose_device()
    dtype = choose_dtype(None if device == "cpu" else row.dtype, device)
    pipe = load_pipeline(model, device, dtype)
    if type(pipe).__name__ != row.pipeline:
        raise SystemExit(f"{model} is a {type(pipe).__name__}; this row is of {row.pipeline}")
    if row.scheduler:
        config = pipe.scheduler.config
        pipe.scheduler = type(pipe.scheduler).from_config(config, **row.scheduler)
    pipe.vae.enable_tiling()
    return pipe


def searched(pipe, prompt: str, seed: int, call: dict, path: Path) -> Path:
    """A file of modes for Sparse-vDiT, by one more generation."""
    check_call(pipe, call)
    path.parent.mkdir(parents=True, exist_ok=True)
    calibrate(pipe, latent_run(pipe, call, [prompt], seed), ModeSearch()).save(path)
    return path


def ours(report: dict) -> dict:
    """Means over the clips, named as the paper's; None where not measured."""
    runs, seconds = report["runs"], {clip["id"]: clip["seconds"] for clip in report["dense"]}
    found = {}
    for name in ("psnr", "ssim", "lpips"):
        values = [run[name] for run in runs if run[name] is not None]
        found[name] = sum(values) / len(values) if values else None
    dense = sum(seconds[run["dense_id"]] for run in runs)
    found["speedup"] = dense / sum(run["seconds"] for run in runs)
    return found


def main() -> None:
    try:
        reproduce(parse_arguments())
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def reproduce(args: argparse.Namespace) -> None:
    if args.row is None:
        print(table())
        return
    row = ROWS[args.row]
    call = settings(row, args)
    show(args.row, row, call)
    if args.print:
        return
    prompts, seeds = read_prompts(args.prompt, args.prompt_file), args.seed or [0]
    if not prompts:
        raise SystemExit(f"give --prompt-file or --prompt; the paper's are of {row.prompts}")
    if args.table and not Path(args.table).is_file():
        raise SystemExit(f"no table at {args.table}: leave --table out, and one is searched")
    out = args.out or Path("reproduce") / args.row
    model = args.model or row.model
    pipe = load(row, model)
    modes = args.table
    if "{table}" in row.method and modes is None:
        modes = searched(pipe, prompts[0], seeds[0], call, out / "modes.json")
    comparison = Comparison(
        pipe=pipe,
        source=model,
        arguments=call_arguments(pipe, model).override(**call),
        prompts=prompts,
        seeds=seeds,
        methods=[parse_method(row.method.format(table=modes))],
        out=out,
        lpips=Lpips(args.lpips_weights),
    )
    comparison.prepare()
    here = ours(comparison.run())
    print(f"{'':10} {'paper':>8} {'here':>8}")
    for name, value in here.items():
        both = ("-" if x is None else f"{x:.4g}" for x in (row.published.get(name), value))
        print(f"{name:10}", *(f"{x:>8}" for x in both))
    print(out / "report.html")


if __name__ == "__main__":
    main()
