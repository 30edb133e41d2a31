"""Training stage: the video transformer and its text encoder, on latents with noise."""

import copy
import time
from typing import NamedTuple

import clips
import solids
import torch
import torch.nn.functional as F
import train_models as parts
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
    mean, std = args.family.latent_statistics(vae)
    shape = (size.clips, parts.LATENT_CHANNELS, size.frames, size.side // 4, size.side // 4)
    latents = torch.empty(shape, dtype=torch.bfloat16, device=args.device)
    captions = []
    with parts.per_frame(vae, args.family.PATCHES), autocast(args):
        while len(captions) < size.clips and (time.monotonic() < end or not captions):
            number = min(size.chunk, size.clips - len(captions))
            solid = torch.rand(1, generator=generator).item() < size.solids
            draw = solids.draw_solids if solid else clips.draw_clips
            video, text, _ = draw(
                number, size.frames, size.side, size.side, generator, args.device, **size.draw
            )
            code = (args.family.encode(vae, video.transpose(1, 2))[0] - mean) / std
            latents[len(captions) : len(captions) + number] = code
            captions += text
            if args.device == "cuda":
                torch.cuda.synchronize()
    record(args, stage="encode", clips=len(captions), frames=size.frames, size=size.side)
    ids = args.family.tokenize(tokenizer, captions)
    return latents[: len(captions)], ids.to(args.device)


class Trainer:
    """Transformer, text encoder, their averages and the optimiser, saved as one checkpoint."""

    def __init__(self, args, tokenizer):
        torch.manual_seed(args.seed)
        self.args, self.family, self.path = args, args.family, args.work / "transformer.pt"
        self.model = torch.nn.ModuleDict(self.start_from(args, tokenizer)).to(args.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = optimizers(self.model, args.lr, args.device)
        self.empty = self.family.tokenize(tokenizer, [""]).to(args.device)  # (1, L)
        self.turned = parts.turned_words(tokenizer).to(args.device)  # (V,)
        config = self.model.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        codes = torch.randn(len(tokenizer), width, generator=torch.Generator().manual_seed(0))
        self.codes = F.normalize(codes, dim=1).to(args.device)  # (V, C)
        self.family.text_projection(self.model.transformer).register_forward_hook(self.hear)
        self.step, self.trained = 0, 0.0
        if self.path.exists():
            self.load()
        elif args.init:
            self.step = last_step(args)
        if args.device == "cuda":
            for block in self.family.blocks(self.model.transformer):
                block.compile(dynamic=False)

    def hear(self, module, inputs, words):
        """Keep the text as the blocks will see it, (B, L, C)."""
        self.words = words

    def start_from(self, args, tokenizer):
        """New weights, or those of a saved pipeline."""
        family = self.family
        if not args.init:
            return {
                "transformer": family.build_transformer(args.layers),
                "text_encoder": family.build_text_encoder(len(tokenizer)),
            }
        text_encoder = family.build_text_encoder(len(tokenizer))
        saved = family.TEXT_ENCODER.from_pretrained(
            args.init, subfolder="text_encoder", dtype=torch.float32
        )
        text_encoder.load_state_dict(saved.state_dict())
        return {
            "transformer": family.TRANSFORMER.from_pretrained(args.init, subfolder="transformer"),
            "text_encoder": text_encoder,
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

    def draw(self, pool):
        """Clean latents, ids with an eighth of the captions left out, noise levels and noise."""
        rows = torch.randint(len(pool.latents), (pool.batch,), device=pool.ids.device)
        clean, ids = pool.latents[rows].float(), pool.ids[rows]
        dropped = torch.rand(pool.batch, 1, device=ids.device) < 0.12
        ids = torch.where(dropped, self.empty, ids)
        levels = self.family.levels(self.family.draw_times(pool.batch, pool.shift, ids.device))
        return clean, ids, levels, torch.randn_like(clean)

    def loss(self, pool):
        """Denoising loss; besides, each word must be readable from its embedding by a fixed code.

        A text encoder that is trained by denoising alone merges words whose difference it does
        not need yet (left and right), and never tells them apart again.
        """
        clean, ids, levels, noise = self.draw(pool)
        denoising = self.denoising_loss(clean, ids, levels, noise)
        return denoising, self.reading_loss(ids)

    def reading_loss(self, ids):
        ids = ids[:, self.family.FIRST_WORD :]
        words = self.words[:, : ids.shape[1]].float()
        return F.cross_entropy((words @ self.codes.T).mT, ids, ignore_index=0)

    def denoising_loss(self, clean, ids, levels, noise):
        """Mean squared error of the prediction at `levels`, each (B,)."""
        keep, add, up, down = (level.view(-1, 1, 1, 1, 1) for level in levels[:4])
        predicted = self.predict(self.model, keep * clean + add * noise, levels.timestep, ids)
        return F.mse_loss(predicted, up * noise - down * clean)

    def predict(self, model, noisy, timestep, ids, guidance=None):
        with autocast(self.args):
            text = self.family.embed_text(model.text_encoder, ids)
            predicted = self.family.predict(model.transformer, noisy, timestep, text, ids, guidance)
        return predicted.float()

    @torch.no_grad()
    def direction_gain(self, pool):
        """How much worse the prediction is with captions of the opposite direction, relative."""
        clean, ids = pool.latents[: pool.batch].float(), pool.ids[: pool.batch]
        generator = torch.Generator(ids.device).manual_seed(0)
        noise = torch.randn(clean.shape, generator=generator, device=ids.device)
        levels = self.family.levels(torch.full((len(clean),), 0.9, device=ids.device))
        right, wrong = (
            self.denoising_loss(clean, words, levels, noise) for words in (ids, self.turned[ids])
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
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), rate
            )
        return loss.detach()


class Pool(NamedTuple):
    """Encoded clips of one size, how many make a batch, and the shift of their noise levels."""

    latents: Tensor  # (N, 8, T, h, w) bfloat16
    ids: Tensor  # (N, L)
    batch: int
    shift: float


def train_transformer(args):
    trainer = Trainer(args, args.family.build_tokenizer())
    pools = prepare_pools(args, trainer)
    end = START + args.seconds
    total = trainer.trained + end - time.monotonic() if args.final else args.total_seconds
    run_updates(args, trainer, pools, end, first_says(total, args.device))
    trainer.save()


def prepare_pools(args, trainer):
    """Clips of each kind, encoded, and the model compiled for them outside the training clock."""
    tokenizer, vae = args.family.build_tokenizer(), load_vae(args)
    seed = args.seed + 1000 + trainer.step + 100_000 * args.rank  # other clips in each call
    torch.manual_seed(seed)
    pools = {}
    for number, (name, size) in enumerate(args.sizes.items()):
        latents, ids = encode_pool(args, vae, tokenizer, size, seed + number)
        pools[name] = Pool(latents, ids, size.batch, size.shift)
        sum(trainer.loss(pools[name])).backward()
        trainer.model.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        record(args, stage="compile", frames=size.frames, size=size.side)
    return pools


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
        for _ in range(args.clock):
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
