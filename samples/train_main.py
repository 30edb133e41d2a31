"""The stages of training a tiny text-to-video pipeline from scratch on drawn clips.

`train_wan.py`, `train_hunyuan_video.py` and `train_cogvideox.py` are called; each holds the parts
of its family. Stages: a per-frame autoencoder, the network that checks prompts (one for all),
the video transformer with its text encoder, `guidance` for HunyuanVideo, and the pipeline folder.
Each leaves a checkpoint in --work and goes on from it. `--final` lets the learning rate reach its
end within this call. `--smoke` runs it all in little.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import prompt_check
import torch
import torch.distributed as dist
import train_models as parts
from train_common import load_vae, record, start_processes
from train_guidance import train_guidance
from train_transformer import train_transformer
from train_vae import train_vae


class Size(NamedTuple):
    """Clips of one size: how many are held encoded, drawn in how many seconds at most."""

    frames: int
    side: int  # pixels
    clips: int
    seconds: float
    chunk: int  # drawn at once
    batch: int
    shift: float  # of the noise levels: more noise for more tokens
    solids: float = 0.0  # share of clips with ray-marched solids
    draw: dict = {}


# One shape on a plain ground: what moves, and where to, is all that there is to learn.
PLAIN = {"top_speed": 1.5, "camera": 0, "second": 0, "pillar": 0, "light": 0, "contrast": 0.01}
SIZES = {
    "plain": Size(9, 64, 65536, 15, 512, 256, 4.0, 0.0, PLAIN),
    "low": Size(17, 64, 65536, 20, 256, 128, 3.0, 0.2),
    "main": Size(17, 128, 32768, 30, 64, 32, 4.0, 0.2),
    "large": Size(33, 256, 512, 10, 8, 2, 6.0, 0.2),
}
SMOKE_SIZES = {
    "plain": Size(3, 16, 4, 3, 4, 2, 4.0, 0.0, PLAIN),
    "low": Size(3, 16, 4, 3, 4, 2, 3.0, 0.5),
    "main": Size(3, 32, 8, 3, 4, 2, 4.0, 0.5),
    "large": Size(5, 64, 2, 3, 1, 1, 6.0, 0.5),
}


def parse_arguments(family):
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    stages = "vae, checker, transformer, guidance, save"
    add("--stage", default="vae,transformer,save", help=f"comma-separated: {stages}")
    add("--out", type=Path, default=Path("samples") / family.NAME)
    add("--checker", type=Path, default=Path("samples/prompt_checker.safetensors"))
    add("--work", type=Path, default=Path("work") / family.NAME, help="checkpoints")
    add("--seconds", type=float, default=540, help="wall-clock budget of this call")
    add("--vae-seconds", type=float, default=110)
    add("--checker-seconds", type=float, default=60)
    add("--guidance-seconds", type=float, default=90)
    add("--total-seconds", type=float, default=720, help="transformer training over all calls")
    add("--init", type=Path, help="pipeline folder to go on from, instead of new weights")
    add("--final", action="store_true", help="finish the learning-rate schedule in this call")
    add("--pools", default=",".join(SIZES), help="kinds of clips to train on")
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="seconds on a CPU: tiny sizes, a few iterations")
    args = parser.parse_args()
    start_processes(args)
    args.family, args.clock = family, 25
    args.frames, args.size, args.layers, args.chunk = 17, 128, family.LAYERS, 64
    sizes = SMOKE_SIZES if args.smoke else SIZES
    args.sizes = {name: sizes[name] for name in args.pools.split(",")}
    if args.smoke:
        args.frames, args.size, args.chunk, args.clock = 3, 32, 4, 4
        args.layers = family.LAYERS if args.init else 2
        args.vae_seconds = args.checker_seconds = args.guidance_seconds = 2
        args.total_seconds = 4
    return args


def train_checker(args):
    if args.rank:
        return
    prompt_check.train_checker(
        args.checker, load_vae(args), args.family, args.checker_seconds, args.frames, args.size,
        batch=args.chunk, log=lambda **values: record(args, stage="checker", **values),
    )  # fmt: skip


def save(args):
    if args.rank:
        return
    family = args.family
    state = torch.load(args.work / "transformer.pt", map_location="cpu")["average"]
    models = {
        "transformer": family.build_transformer(args.layers),
        "text_encoder": family.build_text_encoder(len(family.build_tokenizer())),
    }
    torch.nn.ModuleDict(models).load_state_dict(state)
    args.device = "cpu"
    pipe = family.assemble(load_vae(args), **models)
    before = smoke_video(family, pipe) if args.smoke else None
    parts.save_pipeline(args.out, pipe.to(dtype=torch.float16), family.CALL)
    draw_curve(args)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    record(args, stage="save", megabytes=size / 1e6)
    if args.smoke:
        after = smoke_video(family, family.PIPELINE.from_pretrained(args.out))
        record(
            args, stage="smoke", shape=list(after.shape), finite=bool(after.isfinite().all()),
            equal=torch.equal(before, after),
        )  # fmt: skip


def smoke_video(family, pipe):
    """Two steps of a small clip, (1, T, 3, H, W), by weights that 16 bits can hold."""
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            for parameter in module.parameters():
                parameter.data = parameter.data.half().float()
    pipe.set_progress_bar_config(disable=True)
    call = family.CALL | family.SMOKE_CALL
    generator = torch.Generator().manual_seed(0)
    return pipe(parts.PROMPTS[0], generator=generator, output_type="pt", **call).frames


def draw_curve(args):
    """Loss against updates, as a picture beside the log."""
    try:
        import matplotlib
    except ImportError:
        return record(args, stage="curve", skipped="matplotlib is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = Path(f"{args.out}_training.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    points = [(x["step"], x["loss"]) for x in lines if x["stage"] == "transformer"]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    if points:
        axes.plot(*zip(*points), linewidth=0.8)
        axes.set_yscale("log")
    axes.set(xlabel="update", ylabel="denoising loss", title=f"Training of {args.family.NAME}")
    axes.grid(alpha=0.3)
    figure.savefig(f"{args.out}_training.png", dpi=120)


STAGES = {
    "vae": train_vae, "checker": train_checker, "transformer": train_transformer,
    "guidance": train_guidance, "save": save,
}  # fmt: skip


def main(family):
    args = parse_arguments(family)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 32  # sizes, with gradients and without, the teacher
    for folder in (args.work, args.out.parent, args.checker.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for stage in args.stage.split(","):
        done = {"vae": args.work / "vae.pt", "checker": args.checker}.get(stage)
        if not (done and done.exists()):
            STAGES[stage](args)
        if args.world > 1:
            dist.barrier()
    if args.world > 1:
        dist.destroy_process_group()
