"""Training stage: the autoencoder, frame by frame on a few frames of each clip."""

import time

import clips
import torch
import torch.nn.functional as F
import train_models as parts
from train_common import adamw, autocast, cosine, record, save_checkpoint

FRAMES = 4  # normalised together, as the classes' own decoding does with a few


def draw_batches(args, generator):
    """Shuffled clips (N, 3, FRAMES, size, size): whole small drawings and crops of large ones."""
    size, count = args.size, 2 * args.chunk
    small, large = (
        clips.draw_clips(n, FRAMES, s, s, generator, args.device)[0]
        for n, s in ((count, size), (count // 4, 2 * size))
    )
    y, x = torch.randint(size, (2,), generator=generator).tolist()
    video = torch.cat([small, large[..., y : y + size, x : x + size]]).transpose(1, 2)
    return video[torch.randperm(len(video), generator=generator).to(args.device)]


def train_vae(args):
    """The first process trains; the others find its checkpoint."""
    if args.rank:
        return
    vae = args.family.build_vae().to(args.device)
    generator = torch.Generator().manual_seed(args.seed + 1)
    optimizer = adamw(vae.parameters(), 2e-3, args.device)
    record(args, stage="vae", parameters=sum(p.numel() for p in vae.parameters()))
    start, step, elapsed = time.monotonic(), 0, 0.0
    with parts.per_frame(vae, args.family.PATCHES):
        while elapsed < args.vae_seconds:
            for video in draw_batches(args, generator).split(args.chunk // FRAMES):
                optimizer.param_groups[0]["lr"] = 2e-3 * cosine(elapsed / args.vae_seconds, 0.02)
                loss = vae_step(args, vae, optimizer, video)
                elapsed, step = time.monotonic() - start, step + 1
                if step % 100 == 0:
                    record(args, stage="vae", step=step, loss=loss.item())
                if elapsed > args.vae_seconds:
                    break
        parts.zero_past_taps(vae)
        measure_vae(args, vae.eval())
    measure_stock(args, vae)
    names = ("latents_mean", "latents_std", "scaling_factor")
    config = {name: vae.config[name] for name in names if name in vae.config}
    save_checkpoint(args.work / "vae.pt", {"weights": vae.state_dict(), "config": config})


def vae_step(args, vae, optimizer, video):
    with autocast(args):
        mean, log_variance = args.family.encode(vae, video)
        log_variance = log_variance.clamp(-20, 10)
        noisy = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        decoded = args.family.decode(vae, noisy)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    loss = F.mse_loss(decoded, video) + 0.1 * F.l1_loss(decoded, video) + 5e-4 * kl
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def psnr(decoded, video):
    """Of each clip, (B,)."""
    errors = (decoded.clamp(-1, 1) - video).square().mean((1, 2, 3, 4))
    return 10 * torch.log10(4 / errors)


@torch.no_grad()
def measure_vae(args, vae):
    """Report PSNR on unseen clips and put the latents' statistics into the config."""
    generator = torch.Generator().manual_seed(args.seed + 2)
    batches = draw_batches(args, generator).split(args.chunk // FRAMES)
    means = [args.family.encode(vae, video)[0] for video in batches]
    found = [psnr(args.family.decode(vae, mean), video) for mean, video in zip(means, batches)]
    found = torch.cat(found)
    record(args, stage="vae", psnr=found.mean().item(), worst_tenth=found.quantile(0.1).item())
    args.family.set_statistics(vae, torch.cat(means).transpose(0, 1).flatten(1))  # (8, N)


@torch.no_grad()
def measure_stock(args, vae):
    """PSNR of whole clips, decoded as the pipeline will: normalised over other frames."""
    size, generator = args.size, torch.Generator().manual_seed(args.seed + 3)
    video = clips.draw_clips(8, args.frames, size, size, generator, args.device)[0].transpose(1, 2)
    with parts.per_frame(vae, args.family.PATCHES):
        mean = args.family.encode(vae, video)[0]
    decoded = vae.decode(mean).sample
    decoded = decoded[:, :, :: (decoded.shape[2] - 1) // (args.frames - 1)]
    record(args, stage="vae", psnr_as_in_the_pipeline=psnr(decoded, video).mean().item())
