"""Check that generated clips show what their prompts say.

    python samples/prompt_check.py --pipeline samples/wan_tiny --out report.json
    python samples/prompt_check.py --pipeline samples/cogvideox_tiny --mask-text --out masked.json
    python samples/prompt_check.py --pipeline samples/wan_tiny --call '{"num_inference_steps": 4}'

A small network, trained on drawn clips, names colour, shape, direction and speed of the main
object; most prompts say nothing of speed. A third of the test prompts combine the others in ways
that no training clip showed. `--mask-text` hides the text keys from all queries: what is then still
right is chance, or has another way in.
"""

import argparse
import json
import random
import time
from pathlib import Path

import clips
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

ATTRIBUTES = ("colour", "shape", "direction", "speed")
SIZES = (len(clips.COLOURS), len(clips.SHAPES), len(clips.DIRECTIONS), len(clips.SPEEDS))
SPEED_WORDS = {"": -1, " slowly": 0, " quickly": 1}  # the class that a prompt asks for


class Stage(nn.Module):
    """Look around within the frame, then one frame back and ahead."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.space = nn.Conv3d(
            inputs, width, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1)
        )
        self.norm = nn.GroupNorm(8, width)
        self.time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        x = F.silu(self.norm(self.space(x)))
        return x + F.silu(self.time(x))


def over_time(inputs, width):
    return nn.Sequential(
        nn.Conv1d(inputs, width, 3, padding=1), nn.SiLU(),
        nn.Conv1d(width, width, 3, padding=1), nn.SiLU(),
    )  # fmt: skip


class Checker(nn.Module):
    """Video (B, T, 3, H, W) in [-1, 1] to logits of colour, shape, direction and speed.

    Four attention maps find the object in each frame; what they see and where they look, over
    time, gives the answer.
    """

    def __init__(self, width=64, maps=4, seen=16):
        super().__init__()
        self.stages = nn.Sequential(
            Stage(3, 24, 2), Stage(24, 40, 2), Stage(40, 56, 2), Stage(56, width, 1)
        )
        self.look = nn.Conv3d(width, maps, 1)
        self.see = nn.Conv3d(width, seen, 1)
        self.motion = over_time(maps * (seen + 2) + width, 64)
        self.heads = nn.Linear(64, sum(SIZES[:3]))
        self.speed = over_time(maps * (seen + 2) + width, 32)
        self.speed_head = nn.Linear(32, SIZES[3])

    def forward(self, video):
        count, frames = video.shape[:2]
        x = F.adaptive_avg_pool2d(video.flatten(0, 1), 64)
        x = self.stages(x.unflatten(0, (count, frames)).transpose(1, 2)).float()  # (B, C, T, 8, 8)
        place = torch.linspace(-2, 2, 8, device=x.device)
        place = torch.stack(torch.meshgrid(place, place, indexing="ij")).flatten(1)  # (2, 64)
        look = self.look(x).float().flatten(3).softmax(-1)  # (B, K, T, 64)
        see = self.see(x).float().flatten(3)  # (B, S, T, 64)
        features = torch.cat([
            torch.einsum("bktp,bstp->bkst", look, see).flatten(1, 2),
            torch.einsum("bktp,sp->bkst", look, place).flatten(1, 2),
            x.amax((-2, -1)),
        ], 1)  # fmt: skip
        answers = self.heads(self.motion(features).mean(-1)).split(SIZES[:3], dim=1)
        return *answers, self.speed_head(self.speed(features).mean(-1))


def predict(checker, video, batch=32):
    """Labels (B, 4) on the CPU."""
    device = next(checker.parameters()).device
    with torch.no_grad():
        logits = [checker(part.to(device).float()) for part in video.split(batch)]
    return torch.cat([torch.stack([x.argmax(1) for x in part], 1) for part in logits]).cpu()


def accuracy(found, wanted):
    """Share of right answers, of those that a prompt asks for (-1: it does not)."""
    asked = wanted >= 0
    right = ((found == wanted) & asked).sum(0) / asked.sum(0)
    shares = {name: round(value, 4) for name, value in zip(ATTRIBUTES, right.tolist())}
    return {name: shares[name] for name, any_ in zip(ATTRIBUTES, asked.any(0)) if any_} or None


# ----------------------------------------------------------------------------- the network itself


def draw_single(count, frames, size, generator, device):
    """Clips of one object, all combinations, held out or not."""
    return clips.draw_clips(
        count, frames, size, size, generator, device, table=clips.triples(), second=0, pillar=0
    )


def degrade(video):
    """A little noise, blur and darkness: generated clips are not as clean as drawn ones."""
    count, device = len(video), video.device
    blurred = F.avg_pool2d(video.flatten(0, 1), 5, 1, 2, count_include_pad=False)
    blurred = blurred.unflatten(0, video.shape[:2])
    weight, level, gain = torch.rand(3, count, 1, 1, 1, 1, device=device)
    video = torch.lerp(video, blurred, weight * 0.8) + 0.12 * level * torch.randn_like(video)
    return video * (0.85 + 0.2 * gain)


@torch.no_grad()
def round_trip(vae, family, video):
    """Through the autoencoder of a `train_*.py` and back, with noise on the latents."""
    from train_models import per_frame

    with (
        per_frame(vae, family.PATCHES),
        torch.autocast(video.device.type, torch.bfloat16, video.is_cuda),
    ):
        mean = family.encode(vae, video.transpose(1, 2))[0]
        mean = mean + 0.15 * family.latent_statistics(vae)[1] * torch.randn_like(mean)
        return family.decode(vae, mean).clamp(-1, 1).transpose(1, 2)


def train_checker(path, vae, family, seconds, frames=17, size=128, batch=64, log=print, keep=None):
    """Train on drawn clips for a while and write the weights in 16 bits.

    `keep` is a file of weights that stay as they are: only what it lacks is trained.
    """
    torch.manual_seed(7)
    device, generator = vae.device, torch.Generator().manual_seed(7)
    kept = load_file(keep) if keep else {}
    checker = Checker()
    checker.load_state_dict({k: v.float() for k, v in kept.items()}, strict=False)
    checker.to(device)
    for name, weight in checker.named_parameters():
        weight.requires_grad_(name not in kept)
    trained = [weight for weight in checker.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3, weight_decay=0.01)
    start, step, elapsed = time.monotonic(), 0, 0.0
    while elapsed < seconds:
        video, _, labels = draw_single(batch, frames, size, generator, device)
        video = round_trip(vae, family, video) if step % 2 else video
        for _ in range(2):
            progress = min(elapsed / seconds, 1.0)
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * (1.02 - progress)
            with torch.autocast(device.type, torch.bfloat16, video.is_cuda):
                logits = checker(degrade(video))
            loss = sum(
                F.cross_entropy(x.float(), y, ignore_index=-1)
                for x, y in zip(logits, labels.to(device).unbind(1))
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        step += 1
        if step % 50 == 0:
            log(step=step, loss=loss.item())
        elapsed = time.monotonic() - start
    save_file({k: v.half().contiguous() for k, v in checker.state_dict().items()}, path)
    checker = load_checker(path, device)
    log(step=step, accuracy=score_drawn(checker, frames, size, batch, device))


def load_checker(path, device="cpu"):
    checker = Checker()
    checker.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return checker.to(device).eval()


def score_drawn(checker, frames=17, size=128, count=64, device="cpu", batches=8):
    """Accuracy on fresh drawn clips, which bounds every other figure."""
    generator = torch.Generator().manual_seed(99)
    drawn = [draw_single(count, frames, size, generator, device) for _ in range(batches)]
    found = torch.cat([predict(checker, video) for video, _, _ in drawn])
    return accuracy(found, torch.cat([labels for _, _, labels in drawn]))


# ------------------------------------------------------------------------------------- the check


def make_test_prompts(count=50, seed=5):
    """Prompts, labels (N, 4) and flags: the first third is held out of training."""
    rng = random.Random(seed)
    held = clips.holdout().tolist()
    seen = clips.triples()[len(held) :].tolist()
    most = min(3 * len(held), 3 * len(seen) // 2)
    if not 1 <= count <= most:
        raise SystemExit(f"there are no {count} different prompts: ask for 1 to {most}")
    third = (count + 2) // 3
    labels = rng.sample(held, third) + rng.sample(seen, count - third)
    prompts, speeds = zip(*(write_prompt(*label, rng) for label in labels))
    labels = [[*label, speed] for label, speed in zip(labels, speeds)]
    return list(prompts), torch.tensor(labels), torch.arange(count) < third


def write_prompt(colour, shape, direction, rng):
    thing = f"{list(clips.COLOURS)[colour]} {clips.SHAPES[shape]}"
    way = clips.DIRECTIONS[direction]
    article = "an" if thing[0] == "o" else "a"
    text = f"{article} {thing} {'standing' if way == 'still' else 'moving'} {way}"
    speed = "" if way == "still" else rng.choice(("", "", " slowly", " quickly"))
    text += speed
    if rng.random() < 0.5:
        text += f" over a {rng.choice(list(clips.BACKGROUNDS))} background"
    if rng.random() < 0.25:
        text += f", the camera {rng.choice(clips.CAMERAS[1:])}"
    return text, SPEED_WORDS[speed]


def generate(pipe, prompts, seeds, call, batch=25):
    """Videos (N, T, 3, H, W) in [-1, 1] on the CPU, one frame for each of the latents."""
    videos = []
    for i in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
        result = pipe(prompts[i : i + batch], generator=generators, output_type="pt", **call)
        frames = result.frames[:, :: pipe.vae_scale_factor_temporal]
        videos.append(frames.float().cpu() * 2 - 1)
    return torch.cat(videos)


class TextMasked:
    """A processor of joint attention whose queries see the video's keys alone."""

    def __init__(self, processor, text_first):
        self.processor, self.text_first = processor, text_first

    def __call__(
        self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None
    ):
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        seen = torch.arange(video + text, device=hidden_states.device)
        seen = (seen >= text) if self.text_first else (seen < video)
        mask = seen.expand(len(hidden_states), 1, 1, -1)
        if self.text_first:  # CogVideoX: added to the logits, and repeated over heads
            mask = torch.where(mask[:, 0], 0.0, -torch.inf).to(hidden_states.dtype)
        return self.processor(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def mask_text(transformer):
    """Hide the text keys of HunyuanVideo or CogVideoX."""
    text_first = type(transformer).__name__.startswith("CogVideoX")
    blocks = [
        *transformer.transformer_blocks,
        *getattr(transformer, "single_transformer_blocks", ()),
    ]
    for block in blocks:
        attention = block.attn1 if text_first else block.attn
        attention.set_processor(TextMasked(attention.processor, text_first))


def psnr(a, b):
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3, 4)))


def check_pipeline(pipe, checker, call, count=50):
    """Report of one pipeline, and its clips."""
    prompts, labels, held = make_test_prompts(count)
    first, second = (
        generate(pipe, prompts, [base + i for i in range(count)], call) for base in (1000, 2000)
    )
    found = predict(checker, first)
    shuffled = [accuracy(found, labels.roll(k, 0)) for k in range(1, count)]
    chance = None  # one prompt has no other to be shuffled with
    if shuffled:
        means = {a: sum(x[a] for x in shuffled) / len(shuffled) for a in shuffled[0]}
        chance = {a: round(value, 4) for a, value in means.items()}
    both = torch.cat([found, predict(checker, second)])
    report = {
        "prompts": count,
        "accuracy": accuracy(found, labels),
        "accuracy_held_out": accuracy(found[held], labels[held]),
        "accuracy_two_seeds": accuracy(both, labels.repeat(2, 1)),
        "accuracy_shuffled_prompts": chance,
        "checker_on_drawn_clips": score_drawn(
            checker, *first.shape[1:4:2], device=next(checker.parameters()).device
        ),
        "psnr_between_seeds": round(psnr(first, second).mean().item(), 2),
        "clips": [
            {"prompt": p, "held_out": bool(h), "found": name(f), "right": (f == w)[w >= 0].tolist()}
            for p, h, f, w in zip(prompts, held, found, labels)
        ],
    }
    return report, first


def name(label):
    words = list(clips.COLOURS), clips.SHAPES, clips.DIRECTIONS, clips.SPEEDS
    return " ".join(names[i] for names, i in zip(words, label.tolist()))


def contact_sheet(video, path, rows=20, columns=8):
    """One clip a row, frames from left to right."""
    from PIL import Image

    frames = torch.linspace(0, video.shape[1] - 1, columns).long()
    sheet = video[:rows, frames].permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()).save(path)


def main():
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--pipeline", type=Path, default=Path("samples/wan_tiny"))
    add("--checker", type=Path, default=Path("samples/prompt_checker.safetensors"))
    add("--prompts", type=int, default=50)
    add("--call", type=json.loads, default={}, help="JSON over what dit_sparse.json says")
    add("--out", type=Path, default=Path("prompt_check.json"))
    add("--mask-text", action="store_true", help="HunyuanVideo and CogVideoX: hide the text keys")
    add("--sheet", type=Path, help="contact sheet; default: beside the report")
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"--prompts is at least 1, got {args.prompts}")
    make_test_prompts(args.prompts)  # before anything is loaded
    for path in (args.pipeline / "dit_sparse.json", args.checker):
        if not path.is_file():
            parser.error(f"there is no {path}")
    if not isinstance(args.call, dict):
        parser.error(f"--call is a JSON object, got {args.call!r}")

    from dit_sparse.loading import load_pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    call = json.loads((args.pipeline / "dit_sparse.json").read_text())["call"] | args.call
    pipe = load_pipeline(args.pipeline, device, torch.float32)
    if args.mask_text:
        if not hasattr(pipe.transformer, "transformer_blocks"):
            parser.error("--mask-text: text is in a cross-attention here, not among the keys")
        mask_text(pipe.transformer)
    report, video = check_pipeline(pipe, load_checker(args.checker, device), call, args.prompts)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    report = {
        "call": call,
        "text_masked": args.mask_text,
        "gpu": gpu,
        "torch": torch.__version__,
        **report,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    contact_sheet(video, args.sheet or args.out.with_suffix(".png"))
    print(json.dumps({k: v for k, v in report.items() if k != "clips"}, indent=1))


if __name__ == "__main__":
    main()
