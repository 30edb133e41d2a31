"""Train a tiny text-to-video Wan pipeline from scratch on drawn clips, on one GPU.

    python samples/train_wan.py --stage vae,checker,transformer,save --seconds 540
    python samples/train_wan.py --stage transformer,save --seconds 500 --final
    torchrun --nproc-per-node 2 samples/train_wan.py --stage transformer,save \\
        --init samples/wan_tiny

Stages: a per-frame autoencoder, the network that checks prompts, the video transformer with its
text encoder, and the pipeline folder.  Each leaves a checkpoint in --work and goes on from it.
`--final` lets the learning rate reach its end within this call.  `--smoke` runs it all in little.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import prompt_check
import torch
import train_models as parts
from diffusers import WanPipeline
from train_common import load_vae, record, start_processes
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
    draw: dict = {}


# One shape on a plain ground: what moves, and where to, is all that there is to learn.
PLAIN = {"top_speed": 1.5, "camera": 0, "second": 0, "pillar": 0, "light": 0, "contrast": 0.01}
SIZES = {
    "plain": Size(9, 64, 65536, 15, 512, 256, 4.0, PLAIN),
    "low": Size(17, 64, 65536, 20, 256, 128, 3.0),
    "main": Size(17, 128, 32768, 30, 64, 32, 4.0),
    "large": Size(33, 256, 512, 10, 8, 2, 6.0),
}
SMOKE_SIZES = {
    "plain": Size(3, 16, 4, 3, 4, 2, 4.0, PLAIN),
    "low": Size(3, 16, 4, 3, 4, 2, 3.0),
    "main": Size(3, 32, 8, 3, 4, 2, 4.0),
    "large": Size(5, 64, 2, 3, 1, 1, 6.0),
}


def parse_arguments():
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--stage", default="all", help="comma-separated: vae, checker, transformer, save; or all")
    add("--out", type=Path, default=Path("samples/wan_tiny"))
    add("--checker", type=Path, default=Path("samples/prompt_checker.safetensors"))
    add("--work", type=Path, default=Path("work/wan_tiny"), help="checkpoints")
    add("--seconds", type=float, default=540, help="wall-clock budget of this call")
    add("--vae-seconds", type=float, default=110)
    add("--checker-seconds", type=float, default=60)
    add("--total-seconds", type=float, default=720, help="transformer training over all calls")
    add("--init", type=Path, help="pipeline folder to go on from, instead of new weights")
    add("--final", action="store_true", help="finish the learning-rate schedule in this call")
    add("--pools", default=",".join(SIZES), help="kinds of clips to train on")
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="seconds on a CPU: tiny sizes, a few iterations")
    args = parser.parse_args()
    if args.stage == "all":
        args.stage = "vae,checker,transformer,save"
    start_processes(args)
    args.frames, args.size, args.layers, args.chunk = 17, 128, 6, 64
    args.sizes = {name: SIZES[name] for name in args.pools.split(",")}
    if args.smoke:
        args.frames, args.size, args.layers, args.chunk = 3, 32, 2, 4
        args.sizes = SMOKE_SIZES
        args.vae_seconds = args.checker_seconds = 3
        args.total_seconds = 6
    return args


def train_checker(args):
    prompt_check.train_checker(
        args.checker, load_vae(args), args.checker_seconds, args.frames, args.size,
        batch=args.chunk, log=lambda **values: record(args, stage="checker", **values),
    )  # fmt: skip


def save(args):
    if args.rank:
        return
    tokenizer = parts.build_tokenizer()
    state = torch.load(args.work / "transformer.pt", map_location="cpu")["average"]
    models = {
        "transformer": parts.build_transformer(args.layers),
        "text_encoder": parts.build_text_encoder(len(tokenizer)),
    }
    torch.nn.ModuleDict(models).load_state_dict(state)
    args.device = "cpu"
    parts.save_pipeline(args.out, load_vae(args), **models)
    draw_curve(args)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    record(args, stage="save", megabytes=size / 1e6)
    if args.smoke:
        pipe = WanPipeline.from_pretrained(args.out)
        call = {**parts.CALL, "height": 32, "width": 32, "num_frames": 2, "num_inference_steps": 2}
        video = pipe(parts.PROMPTS[0], output_type="pt", **call).frames  # (1, 3, 3, 32, 32)
        record(args, stage="smoke", shape=list(video.shape), finite=bool(video.isfinite().all()))


def draw_curve(args):
    """Loss against updates, as a picture beside the log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = Path(f"{args.out}_training.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    points = [(x["step"], x["loss"]) for x in lines if x["stage"] == "transformer"]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    if points:
        axes.plot(*zip(*points), linewidth=0.8)
        axes.set_yscale("log")
    axes.set(xlabel="update", ylabel="flow-matching loss", title="Training of the tiny Wan model")
    axes.grid(alpha=0.3)
    figure.savefig(f"{args.out}_training.png", dpi=120)


def main():
    args = parse_arguments()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    for folder in (args.work, args.out.parent, args.checker.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for stage in args.stage.split(","):
        done = {"vae": args.work / "vae.pt", "checker": args.checker}.get(stage)
        if not (done and done.exists()):
            {"vae": train_vae, "checker": train_checker, "transformer": train_transformer,
             "save": save}[stage](args)  # fmt: skip


if __name__ == "__main__":
    main()
