"""What the training stages share: log, checkpoints, optimiser and its schedule."""

import json
import math
import os
import time

import torch
import torch.distributed as dist

START = time.monotonic()


def start_processes(args):
    """Join the other processes of `torchrun`, one GPU each."""
    args.rank = int(os.environ.get("RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(args.rank)
    if args.world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")


def record(args, **values):
    """One line on screen and in the training log, from the first process."""
    if args.rank:
        return
    values = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    line = json.dumps({**values, "seconds": round(time.monotonic() - START, 1)})
    print(line, flush=True)
    with open(f"{args.out}_training.jsonl", "a") as log:
        log.write(line + "\n")


def last_step(args):
    """Last update in the training log, 0 without one."""
    path = f"{args.out}_training.jsonl"
    lines = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
    return max((line["step"] for line in lines if line["stage"] == "transformer"), default=0)


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def save_checkpoint(path, state):
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def cosine(progress, warmup):
    """Learning-rate factor at `progress` in [0, 1], with a linear start."""
    progress = min(progress, 1.0)
    return min(progress / warmup, 1.0) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def average_gradients(parameters):
    """Mean over processes, in one message."""
    grads = [parameter.grad for parameter in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [piece.view_as(grad) for piece, grad in zip(pieces, grads)])


def first_says(value, device):
    """The first process's number, in all of them."""
    number = torch.tensor([value], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.broadcast(number, 0)
    return number.item()


def optimizers(model, lr, device):
    """Muon for the matrices inside the blocks but those of modulation, AdamW for the rest."""
    inner, rest = [], []
    for name, parameter in model.named_parameters():
        matrix = "blocks." in name and "norm" not in name and parameter.ndim == 2
        if parameter.requires_grad:
            (inner if matrix else rest).append(parameter)
    muon = torch.optim.Muon(inner, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(rest, lr, device)]


def adamw(parameters, lr, device):
    return torch.optim.AdamW(
        parameters, lr, betas=(0.9, 0.95), weight_decay=0.01, fused=device == "cuda"
    )


def load_vae(args):
    if args.init:
        vae = args.family.VAE.from_pretrained(args.init, subfolder="vae")
    else:
        state = torch.load(args.work / "vae.pt", map_location="cpu")
        vae = args.family.build_vae()
        vae.register_to_config(**state["config"])
        vae.load_state_dict(state["weights"])
    return vae.to(args.device).eval().requires_grad_(False)
