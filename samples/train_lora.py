"""Teach the boxed Wan to need 4 steps and no guidance, as a LoRA of about 1 MB.

    python samples/train_lora.py --seconds 400          # one GPU; needs peft
    python samples/prompt_check.py --pipeline samples/wan_tiny_lora --out report.json

The student walks from noise to some step on its own; from there the guided teacher takes small
steps to where the student's next step must end. So the student learns its own trajectory's
corrections too, and no video is needed: only captions and noise.
"""

import argparse
import json
import time
from pathlib import Path

import clips
import torch
import torch.nn.functional as F
import train_wan
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from train_common import START, adamw, autocast, cosine, record, start_processes
from transformers import UMT5EncoderModel

STEPS, TEACHER_STEPS = 4, 6  # the teacher's within each of the student's
# Plain Euler steps at a lower shift: the defaults of the box look back over steps.
SCHEDULER = {"solver_order": 1, "disable_corrector": list(range(STEPS)), "flow_shift": 3.0}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


class Distiller:
    """The boxed model as teacher, and the same with a LoRA as student."""

    def __init__(self, args):
        self.args, self.box = args, args.pipeline
        torch.manual_seed(args.seed)
        load = WanTransformer3DModel.from_pretrained
        self.teacher = load(self.box, subfolder="transformer").to(args.device).requires_grad_(False)
        self.student = load(self.box, subfolder="transformer").requires_grad_(False)
        self.student.add_adapter(
            LoraConfig(r=args.rank_of_lora, lora_alpha=args.rank_of_lora, target_modules=TARGETS)
        )
        self.student.to(args.device)
        self.text_encoder = UMT5EncoderModel.from_pretrained(
            self.box, subfolder="text_encoder", dtype=torch.float32
        ).to(args.device).requires_grad_(False)  # fmt: skip
        self.tokenizer = train_wan.build_tokenizer()
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = adamw(self.parameters, args.lr, args.device)
        scheduler = few_step_scheduler(self.box)
        scheduler.set_timesteps(STEPS)
        self.sigmas = scheduler.sigmas.tolist()  # STEPS + 1, from noise to 0
        self.updates = 0
        if args.device == "cuda":
            for model in (self.teacher, self.student):
                model.compile_repeated_blocks(dynamic=False)

    def velocity(self, model, x, sigma, text):
        step = torch.full((len(x),), float(int(sigma * 1000)), device=x.device)
        with autocast(self.args):
            return train_wan.predict(model, x, step, text, None).float()

    @torch.no_grad()
    def guided_walk(self, x, start, end, text, untold):
        """Where the teacher comes from `start` to `end`."""
        for i in range(TEACHER_STEPS):
            sigma, after = (start + (end - start) * k / TEACHER_STEPS for k in (i, i + 1))
            both = self.velocity(
                self.teacher, x.repeat(2, 1, 1, 1, 1), sigma, torch.cat([untold, text])
            )
            without, told = both.chunk(2)
            x = x + (after - sigma) * torch.lerp(without, told, self.args.guidance)
        return x

    @torch.no_grad()
    def walk(self, x, text, steps=STEPS):
        """The student's first steps from noise."""
        for start, end in zip(self.sigmas[:steps], self.sigmas[1:]):
            x = x + (end - start) * self.velocity(self.student, x, start, text)
        return x

    @torch.no_grad()
    def embed(self, captions):
        ids = train_wan.tokenize(self.tokenizer, captions).to(self.args.device)
        return train_wan.embed_text(self.text_encoder, ids)

    def loss(self, captions, step):
        size = self.args.size // 4
        x = torch.randn(len(captions), 8, self.args.frames, size, size, device=self.args.device)
        text, untold = self.embed(captions), self.embed([""] * len(captions))
        x = self.walk(x, text, step)
        start, end = self.sigmas[step : step + 2]
        wanted = (self.guided_walk(x, start, end, text, untold) - x) / (end - start)
        return F.mse_loss(self.velocity(self.student, x, start, text), wanted)

    def update(self, captions, lr):
        loss = self.loss(captions, self.updates % STEPS)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.updates += 1
        with torch.no_grad():
            rate = 1 - min(0.99, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.average, self.parameters, rate)
        return loss.detach()

    def save(self):
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        layers = {k: v.half() for k, v in get_peft_model_state_dict(self.student).items()}
        layers = {k: v.cpu().contiguous() for k, v in layers.items()}
        WanPipeline.save_lora_weights(self.args.out, transformer_lora_layers=layers)
        settings = json.loads((self.box / "dit_sparse.json").read_text()) | {"measured": []}
        settings["call"] |= {"num_inference_steps": STEPS, "guidance_scale": 1.0}
        settings |= {"base": self.box.name, "scheduler": SCHEDULER}
        (self.args.out / "dit_sparse.json").write_text(json.dumps(settings, indent=2) + "\n")


def few_step_scheduler(box):
    return UniPCMultistepScheduler.from_pretrained(box, subfolder="scheduler", **SCHEDULER)


def draw_captions(count, generator):
    """Captions alone: their clips are drawn as small as can be."""
    return clips.draw_clips(count, 2, 16, 16, generator)[1]


def parse_arguments():
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--pipeline", type=Path, default=Path("samples/wan_tiny"))
    add("--out", type=Path, default=Path("samples/wan_tiny_lora"))
    add("--seconds", type=float, default=400, help="wall-clock budget of this call")
    add("--rank-of-lora", type=int, default=16)
    add("--guidance", type=float, default=3.0, help="of the teacher")
    add("--batch", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="seconds on a CPU: tiny clips, a few updates")
    args = parser.parse_args()
    start_processes(args)
    args.frames, args.size, args.clock = 17, 128, 20
    if args.smoke:
        args.frames, args.size, args.clock, args.batch, args.seconds = 3, 32, STEPS, 2, 0
    return args


def main():
    args = parse_arguments()
    torch.set_float32_matmul_precision("high")
    distiller, generator = Distiller(args), torch.Generator().manual_seed(args.seed)
    captions = draw_captions(64 * args.batch, generator)
    distiller.loss(captions[: args.batch], 0).backward()  # compiles outside the schedule
    begun = elapsed = time.monotonic() - START
    while elapsed < args.seconds or not distiller.updates:
        lr = args.lr * cosine((elapsed - begun) / max(args.seconds - begun, 1.0), 0.03)
        losses = []
        for _ in range(args.clock):
            rows = torch.randint(len(captions), (args.batch,), generator=generator).tolist()
            losses.append(distiller.update([captions[row] for row in rows], lr))
        loss = torch.stack(losses).mean().item()
        record(args, stage="lora", step=distiller.updates, loss=loss, lr=lr)
        elapsed = time.monotonic() - START
    distiller.save()
    size = sum(path.stat().st_size for path in args.out.iterdir())
    record(args, stage="save", megabytes=size / 1e6)


if __name__ == "__main__":
    main()
