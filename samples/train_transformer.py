"""Training stage: the video transformer and its text encoder, by flow matching on latents."""

import copy
import time

import clips
import torch
import torch.nn.functional as F
import train_models as parts
from diffusers import WanTransformer3DModel
from train_common import (
    START,
    autocast,
    average_gradients,
    cosine,
    first_says,
    last_step,
    load_vae,
    optimizers,
    record,
    save_checkpoint,
)
from transformers import UMT5EncoderModel

CLOCK = 25  # updates between looks at the clock


@torch.no_grad()
def encode_pool(args, vae, tokenizer, count, frames, size, chunk, seed, seconds):
    """Draw and encode clips once: latents (N, 8, T, h, w) in bfloat16 and token ids (N, L)."""
    generator, end = torch.Generator().manual_seed(seed), time.monotonic() + seconds
    mean, std = parts.latent_statistics(vae)
    shape = (count, parts.LATENT_CHANNELS, frames, size // 4, size // 4)
    latents = torch.empty(shape, dtype=torch.bfloat16, device=args.device)
    captions = []
    with parts.per_frame(vae), autocast(args):
        while len(captions) < count and (time.monotonic() < end or not captions):
            number = min(chunk, count - len(captions))
            video, text, _ = clips.draw_clips(number, frames, size, size, generator, args.device)
            code = (parts.encode_frames(vae, video.flatten(0, 1))[0] - mean) / std
            code = code.unflatten(0, (number, frames)).transpose(1, 2)
            latents[len(captions) : len(captions) + number] = code
            captions += text
            if args.device == "cuda":
                torch.cuda.synchronize()
    record(args, stage="encode", clips=len(captions), frames=frames, size=size)
    return latents[: len(captions)], parts.tokenize(tokenizer, captions).to(args.device)


class Trainer:
    """Transformer, text encoder, their averages and the optimiser, saved as one checkpoint."""

    def __init__(self, args, tokenizer):
        torch.manual_seed(args.seed)
        self.args, self.path = args, args.work / "transformer.pt"
        self.model = torch.nn.ModuleDict(self.start_from(args, tokenizer)).to(args.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.optimizers = optimizers(self.model, args.lr, args.device)
        self.empty = parts.tokenize(tokenizer, [""]).to(args.device)  # (1, L)
        self.step, self.trained = 0, 0.0
        if self.path.exists():
            self.load()
        elif args.init:
            self.step = last_step(args)
        if args.device == "cuda":
            self.model.transformer.compile_repeated_blocks(dynamic=False)

    def start_from(self, args, tokenizer):
        """New weights, or those of a saved pipeline."""
        if not args.init:
            transformer = parts.build_transformer(args.layers)
            return {
                "transformer": transformer,
                "text_encoder": parts.build_text_encoder(len(tokenizer)),
            }
        return {
            "transformer": WanTransformer3DModel.from_pretrained(
                args.init, subfolder="transformer"
            ),
            "text_encoder": UMT5EncoderModel.from_pretrained(
                args.init, subfolder="text_encoder", dtype=torch.float32
            ),
        }

    def load(self):
        state = torch.load(self.path, map_location=self.args.device)
        for name in ("model", "average"):
            getattr(self, name).load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.trained = state["step"], state["trained"]

    def save(self):
        if self.args.rank:
            return
        state = {name: getattr(self, name).state_dict() for name in ("model", "average")}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_checkpoint(self.path, {**state, "step": self.step, "trained": self.trained})

    def loss(self, pool, batch, shift):
        """Flow-matching loss at logit-normal times, an eighth of the captions left out."""
        latents, ids = pool
        rows = torch.randint(len(latents), (batch,), device=latents.device)
        clean, ids = latents[rows].float(), ids[rows]
        dropped = torch.rand(batch, 1, device=ids.device) < 0.12
        ids = torch.where(dropped, self.empty, ids)
        time_ = torch.randn(batch, device=ids.device).sigmoid()
        time_ = shift * time_ / (1 + (shift - 1) * time_)
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, time_.view(-1, 1, 1, 1, 1))
        with autocast(self.args):
            text = parts.embed_text(self.model.text_encoder, ids)
            velocity = self.model.transformer(noisy, time_ * 1000, text, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - clean)

    def update(self, pool, batch, shift, lr):
        loss = self.loss(pool, batch, shift)
        self.model.zero_grad()
        loss.backward()
        if self.args.world > 1:
            average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        self.step += 1
        rate = 1 - min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, rate)
        return loss.detach()


def compile_shape(trainer, pool, batch):
    """Compile for one shape outside the training clock."""
    trainer.loss(pool, batch, 3.0).backward()
    trainer.model.zero_grad()
    if trainer.args.device == "cuda":
        torch.cuda.synchronize()


def train_transformer(args):
    tokenizer, vae = parts.build_tokenizer(), load_vae(args)
    trainer = Trainer(args, tokenizer)
    seed = args.seed + 1000 + trainer.step + 100_000 * args.rank  # other clips in each call
    torch.manual_seed(seed)
    small = encode_pool(
        args, vae, tokenizer, args.clips, args.frames, args.size, args.chunk, seed,
        args.encode_seconds,
    )  # fmt: skip
    compile_shape(trainer, small, args.batch)
    record(args, stage="compile", parameters=sum(p.numel() for p in trainer.model.parameters()))
    end = START + args.seconds
    left = end - time.monotonic()
    total = trainer.trained + left if args.final else args.total_seconds
    large = None
    if trainer.trained + left > 0.75 * total:
        large = encode_pool(
            args, vae, tokenizer, args.large_clips, args.large_frames, args.large_size,
            max(args.chunk // 8, 1), seed + 1, args.encode_seconds / 4,
        )  # fmt: skip
        compile_shape(trainer, large, args.large_batch)
        record(args, stage="compile")
        total = trainer.trained + end - time.monotonic() if args.final else total
    run_updates(args, trainer, small, large, end, first_says(total, args.device))
    trainer.save()


def run_updates(args, trainer, small, large, end, total):
    """Train until `end` or until `total` seconds of training over all calls.

    Only the first process looks at the clock: all must make the same updates.
    """
    begun = saved = time.monotonic()
    before, late = trainer.trained, False
    while trainer.trained < total and not late:
        progress, losses = trainer.trained / total, []
        lr = args.lr * cosine(progress, 0.03)
        for _ in range(CLOCK):
            use_large = large and progress > 0.75 and trainer.step % 4 == 0
            pool, batch = (large, args.large_batch) if use_large else (small, args.batch)
            loss = trainer.update(pool, batch, 5.0 if use_large else 3.0, lr)
            if not use_large:
                losses.append(loss)
        mean = torch.stack(losses).mean().item()
        record(args, stage="transformer", step=trainer.step, loss=mean, lr=lr)
        now = first_says(time.monotonic(), args.device)
        trainer.trained = before + now - first_says(begun, args.device)
        late = first_says(time.monotonic() > end, args.device) > 0
        if now - saved > 60:
            trainer.save()
            saved = now
