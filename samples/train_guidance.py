"""Training stage: one call with guidance as an input learns what two calls of guidance say."""

import copy
import time

import torch
import torch.nn.functional as F
from train_common import cosine, first_says, optimizers, record
from train_transformer import Trainer, pool_of, prepare_pools

STRONGEST = 5.0


class Pupil(Trainer):
    """Learns from its own average, which stays as it was at the start."""

    def __init__(self, args, tokenizer):
        super().__init__(args, tokenizer)
        self.teacher = copy.deepcopy(self.average)
        self.model.load_state_dict(self.average.state_dict())
        self.optimizers = optimizers(self.model, args.lr, args.device)
        if args.device == "cuda":
            for block in self.family.blocks(self.teacher.transformer):
                block.compile(dynamic=False)

    def loss(self, pool):
        clean, ids, levels, noise = self.draw(pool)
        keep, add = (level.view(-1, 1, 1, 1, 1) for level in levels[:2])
        noisy, step = keep * clean + add * noise, levels.timestep
        scale = 1 + (STRONGEST - 1) * torch.rand(pool.batch, device=ids.device)
        with torch.no_grad():
            told = self.predict(self.teacher, noisy, step, ids)
            untold = self.predict(self.teacher, noisy, step, self.empty.expand_as(ids))
        wanted = torch.lerp(untold, told, scale.view(-1, 1, 1, 1, 1))
        predicted = self.predict(self.model, noisy, step, ids, scale)
        return F.mse_loss(predicted, wanted), self.reading_loss(ids)


def train_guidance(args):
    late = {name: args.sizes[name] for name in ("main", "large") if name in args.sizes}
    args.sizes = {name: size._replace(seconds=size.seconds / 3) for name, size in late.items()}
    pupil = Pupil(args, args.family.build_tokenizer())
    pools = prepare_pools(args, pupil)
    begun = first_says(time.monotonic(), args.device)
    elapsed = 0.0
    while elapsed < args.guidance_seconds:
        lr = 0.3 * args.lr * cosine(elapsed / args.guidance_seconds, 0.05)
        losses = []
        for _ in range(args.clock):
            losses.append(pupil.update(pools[pool_of(1.0, pupil.step, pools)], lr))
        record(args, stage="guidance", step=pupil.step, loss=torch.stack(losses).mean().item())
        elapsed = first_says(time.monotonic(), args.device) - begun
    pupil.save()
