"""Training stage: the autoencoder, on single frames."""

import time

import clips
import torch
import torch.nn.functional as F
import train_models as parts
from train_common import adamw, autocast, cosine, record, save_checkpoint


def draw_frames(args, generator):
    """Shuffled frames (N, 3, size, size): whole small drawings and crops of large ones."""
    size, count = args.size, 2 * args.chunk
    small, large = (
        clips.draw_clips(n, 4, s, s, generator, args.device)[0].flatten(0, 1)
        for n, s in ((count, size), (count // 4, 2 * size))
    )
    y, x = torch.randint(size, (2,), generator=generator).tolist()
    frames = torch.cat([small, large[..., y : y + size, x : x + size]])
    return frames[torch.randperm(len(frames), generator=generator).to(args.device)]


def train_vae(args):
    vae = parts.build_vae().to(args.device)
    generator = torch.Generator().manual_seed(args.seed + 1)
    optimizer = adamw(vae.parameters(), 2e-3, args.device)
    record(args, stage="vae", parameters=sum(p.numel() for p in vae.parameters()))
    start, step, elapsed = time.monotonic(), 0, 0.0
    with parts.per_frame(vae):
        while elapsed < args.vae_seconds:
            for frames in draw_frames(args, generator).split(args.chunk):
                optimizer.param_groups[0]["lr"] = 2e-3 * cosine(elapsed / args.vae_seconds, 0.02)
                loss = vae_step(args, vae, optimizer, frames)
                elapsed, step = time.monotonic() - start, step + 1
                if step % 100 == 0:
                    record(args, stage="vae", step=step, loss=loss.item())
        parts.zero_past_taps(vae)
        vae = measure_vae(args, vae.eval())
    statistics = vae.config.latents_mean, vae.config.latents_std
    state = {"weights": vae.state_dict(), "statistics": statistics}
    save_checkpoint(args.work / "vae.pt", state)


def vae_step(args, vae, optimizer, frames):
    with autocast(args):
        mean, log_variance = parts.encode_frames(vae, frames)
        log_variance = log_variance.clamp(-20, 10)
        noisy = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        decoded = parts.decode_frames(vae, noisy)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    loss = F.mse_loss(decoded, frames) + 0.1 * F.l1_loss(decoded, frames) + 5e-4 * kl
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def measure_vae(args, vae):
    """Report PSNR on unseen clips and put the latents' statistics into the config."""
    frames = draw_frames(args, torch.Generator().manual_seed(args.seed + 2))
    means, errors = [], []
    for part in frames.split(args.chunk):
        mean = parts.encode_frames(vae, part)[0]
        decoded = parts.decode_frames(vae, mean).clamp(-1, 1)
        means.append(mean)
        errors.append((decoded - part).square().mean((1, 2, 3)))
    psnr = 10 * torch.log10(4 / torch.cat(errors))
    record(args, stage="vae", psnr=psnr.mean().item(), worst_tenth=psnr.quantile(0.1).item())
    means = torch.cat(means).transpose(0, 1).flatten(1)  # (8, N)
    vae.register_to_config(latents_mean=means.mean(1).tolist(), latents_std=means.std(1).tolist())
    return vae
