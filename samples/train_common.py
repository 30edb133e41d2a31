"""What the training stages share: log, checkpoints, optimiser and its schedule."""

import json
import math
import time

import torch
import train_models as parts

START = time.monotonic()


def record(args, **values):
    """One line on screen and in the training log."""
    values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    line = json.dumps({**values, "seconds": round(time.monotonic() - START, 1)})
    print(line, flush=True)
    with open(f"{args.out}_training.jsonl", "a") as log:
        log.write(line + "\n")


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def save_checkpoint(path, state):
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def cosine(progress, warmup):
    """Learning-rate factor at `progress` in [0, 1], with a linear start."""
    progress = min(progress, 1.0)
    return min(progress / warmup, 1.0) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def adamw(parameters, lr, device):
    return torch.optim.AdamW(
        parameters, lr, betas=(0.9, 0.95), weight_decay=0.01, fused=device == "cuda"
    )


def load_vae(args):
    state = torch.load(args.work / "vae.pt", map_location="cpu")
    vae = parts.build_vae(*state["statistics"])
    vae.load_state_dict(state["weights"])
    return vae.to(args.device).eval().requires_grad_(False)
