"""Training stage: the video transformer and its text encoder, by flow matching on latents."""

import copy
import time
from typing import NamedTuple

import clips
import torch
import torch.nn.functional as F
import train_models as parts
from diffusers import WanTransformer3DModel
from torch import Tensor
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
READING = 0.05  # weight of the loss that keeps words apart
# Kinds of clips in turn, up to a share of the training; those not asked for are left out.
TURNS = (
    (0.4, ("plain", "main", "plain", "low")),
    (0.7, ("plain", "main", "low", "main")),
    (1.0, ("main",) * 7 + ("large",)),
)


@torch.no_grad()
def encode_pool(args, vae, tokenizer, size, seed):
    """Draw and encode clips once: latents (N, 8, T, h, w) in bfloat16 and token ids (N, L)."""
    generator, end = torch.Generator().manual_seed(seed), time.monotonic() + size.seconds
    mean, std = parts.latent_statistics(vae)
    shape = (size.clips, parts.LATENT_CHANNELS, size.frames, size.side // 4, size.side // 4)
    latents = torch.empty(shape, dtype=torch.bfloat16, device=args.device)
    captions = []
    with parts.per_frame(vae), autocast(args):
        while len(captions) < size.clips and (time.monotonic() < end or not captions):
            number = min(size.chunk, size.clips - len(captions))
            video, text, _ = clips.draw_clips(
                number, size.frames, size.side, size.side, generator, args.device, **size.draw
            )
            code = (parts.encode_frames(vae, video.flatten(0, 1))[0] - mean) / std
            code = code.unflatten(0, (number, size.frames)).transpose(1, 2)
            latents[len(captions) : len(captions) + number] = code
            captions += text
            if args.device == "cuda":
                torch.cuda.synchronize()
    record(args, stage="encode", clips=len(captions), frames=size.frames, size=size.side)
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
        self.turned = parts.turned_words(tokenizer).to(args.device)  # (V,)
        width = self.model.transformer.condition_embedder.text_embedder.linear_2.out_features
        codes = torch.randn(len(tokenizer), width, generator=torch.Generator().manual_seed(0))
        self.codes = F.normalize(codes, dim=1).to(args.device)  # (V, C)
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

    def loss(self, pool):
        """Flow-matching loss at logit-normal times, an eighth of the captions left out.

        Besides, each word must be readable from its embedding by a fixed code. A text encoder
        that is trained on this task alone merges words whose difference it does not need yet
        (left and right), and never tells them apart again.
        """
        rows = torch.randint(len(pool.latents), (pool.batch,), device=pool.ids.device)
        clean, ids = pool.latents[rows].float(), pool.ids[rows]
        dropped = torch.rand(pool.batch, 1, device=ids.device) < 0.12
        ids = torch.where(dropped, self.empty, ids)
        time_ = torch.randn(pool.batch, device=ids.device).sigmoid()
        time_ = pool.shift * time_ / (1 + (pool.shift - 1) * time_)
        flow, text = self.flow_loss(clean, ids, time_, torch.randn_like(clean))
        words = self.model.transformer.condition_embedder.text_embedder(text[:, : ids.shape[1]])
        reading = F.cross_entropy((words.float() @ self.codes.T).mT, ids, ignore_index=0)
        return flow, reading

    def flow_loss(self, clean, ids, time_, noise):
        """Mean squared error of the velocity at `time_` (B,), and the text (B, 512, C)."""
        noisy = torch.lerp(clean, noise, time_.view(-1, 1, 1, 1, 1))
        with autocast(self.args):
            text = parts.embed_text(self.model.text_encoder, ids)
            velocity = self.model.transformer(noisy, time_ * 1000, text, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - clean), text

    @torch.no_grad()
    def direction_gain(self, pool):
        """How much worse captions with the opposite direction predict the velocity, relative."""
        clean, ids = pool.latents[: pool.batch].float(), pool.ids[: pool.batch]
        generator = torch.Generator(ids.device).manual_seed(0)
        noise = torch.randn(clean.shape, generator=generator, device=ids.device)
        time_ = torch.full((len(clean),), 0.9, device=ids.device)
        right, wrong = (
            self.flow_loss(clean, words, time_, noise)[0] for words in (ids, self.turned[ids])
        )
        return (wrong / right - 1).item()

    def update(self, pool, lr):
        loss, reading = self.loss(pool)
        self.model.zero_grad()
        (loss + READING * reading).backward()
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


class Pool(NamedTuple):
    """Encoded clips of one size, how many make a batch, and the shift of their noise levels."""

    latents: Tensor  # (N, 8, T, h, w) bfloat16
    ids: Tensor  # (N, L)
    batch: int
    shift: float


def train_transformer(args):
    tokenizer, vae = parts.build_tokenizer(), load_vae(args)
    trainer = Trainer(args, tokenizer)
    seed = args.seed + 1000 + trainer.step + 100_000 * args.rank  # other clips in each call
    torch.manual_seed(seed)
    pools = {}
    for number, (name, size) in enumerate(args.sizes.items()):
        latents, ids = encode_pool(args, vae, tokenizer, size, seed + number)
        pools[name] = Pool(latents, ids, size.batch, size.shift)
        sum(trainer.loss(pools[name])).backward()  # compiles outside the training clock
        trainer.model.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        record(args, stage="compile", frames=size.frames, size=size.side)
    end = START + args.seconds
    total = trainer.trained + end - time.monotonic() if args.final else args.total_seconds
    run_updates(args, trainer, pools, end, first_says(total, args.device))
    trainer.save()


def pool_of(progress, step, pools):
    names = next(names for end, names in TURNS if progress <= end)
    names = [name for name in names if name in pools]
    return names[step % len(names)]


def run_updates(args, trainer, pools, end, total):
    """Train until `end` or until `total` seconds of training over all calls.

    Only the first process looks at the clock: all must make the same updates.
    """
    begun = saved = time.monotonic()
    before, late = trainer.trained, False
    while trainer.trained < total and not late:
        progress, losses = min(trainer.trained / total, 1.0), []
        lr = args.lr * cosine(progress, 0.03)
        for _ in range(CLOCK):
            name = pool_of(progress, trainer.step, pools)
            loss = trainer.update(pools[name], lr)
            if name == "main":
                losses.append(loss)
        mean, gain = torch.stack(losses).mean().item(), trainer.direction_gain(pools["main"])
        record(
            args, stage="transformer", step=trainer.step, loss=mean, direction_gain=gain, lr=lr
        )  # fmt: skip
        now = first_says(time.monotonic(), args.device)
        trainer.trained = before + now - first_says(begun, args.device)
        late = first_says(time.monotonic() > end, args.device) > 0
        if now - saved > 60:
            trainer.save()
            saved = now
