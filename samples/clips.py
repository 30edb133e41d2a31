"""Procedurally drawn video clips with captions, in plain PyTorch.

A coloured shape crosses a textured scene: it may spin, wobble, carry a pattern, pass in front of
or behind a second shape, or vanish behind a pillar, while the camera pans or zooms and the light
changes.  `draw_clips` draws a batch on any device; everything follows from the generator's seed.

Distances are in pixels; one token is 8 pixels wide, and speeds are in tokens per frame.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from clip_scenes import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    HEADINGS,
    SHAPES,
    TOKEN,
    Dice,
    holdout,
    roll_object,
    roll_scene,
    triples,
    vars_to_lists,
    vocabulary,
    write_caption,
)

FAST = 1.5  # tokens a frame: captions say "slowly" up to 1 and "quickly" from 2 on
SPEEDS = "slow", "fast"

__all__ = ["BACKGROUNDS", "CAMERAS", "COLOURS", "DIRECTIONS", "SHAPES", "draw_clips", "holdout"]
__all__ += ["triples", "vocabulary"]


def signed_distance(shape, x, y):
    """Signed distance to a shape of radius about 1, negative inside; `shape` is an index."""
    r, ax, ay = torch.hypot(x, y), x.abs(), y.abs()
    match SHAPES[shape]:
        case "circle":
            return r - 0.92
        case "square":
            return torch.maximum(ax, ay) - 0.80
        case "triangle":
            return torch.maximum(0.866 * ax - 0.5 * (y - 0.15), y - 0.15) - 0.55
        case "star":
            fold = torch.atan2(x, -y).abs() % (2 * math.pi / 5)
            fold = torch.minimum(fold, 2 * math.pi / 5 - fold)
            tip, inner = 1.15, 0.46
            ex, ey = inner * math.cos(math.pi / 5) - tip, inner * math.sin(math.pi / 5)
            px, py = r * torch.cos(fold) - tip, r * torch.sin(fold)
            return (px * ey - py * ex) / math.hypot(ex, ey)
        case "cross":
            bar = torch.maximum(ax - 1.0, ay - 0.30)
            return torch.minimum(bar, torch.maximum(ay - 1.0, ax - 0.30))
        case "ring":
            return (r - 0.76).abs() - 0.22


def path(thing, t, frame, scale):
    """Centres (B, T, 2): along the heading, swaying across it, wrapping round the frame.

    Halfway through the clip the shape is near the middle of the frame: it crosses the scene, so
    that where it is early tells where it is going.
    """
    last = max(len(t) - 1, 1)
    steps = t / last - 0.5  # (T,)
    heading = HEADINGS.to(t.device)[thing.direction]  # (B, 2)
    along = thing.speed[:, None] * TOKEN * last * steps
    along = along * (1 + thing.acceleration[:, None] * steps)
    reach = torch.minimum(thing.sway * frame.min(), 0.25 * thing.speed * TOKEN * len(t))
    across = reach[:, None] * torch.sin(
        thing.phase[:, None] + 2 * math.pi * thing.sway_turns[:, None] * steps
    )
    centre = thing.middle[:, None] + along[..., None] * heading[:, None]
    centre = centre + across[..., None] * heading.flip(1)[:, None].abs()
    margin = (thing.radius * frame.min() * scale.amax(1) * 1.25)[:, None, None]
    return (centre + margin) % (frame + 2 * margin) - margin


def draw_object(video, thing, shapes, t, frame, scale, visible):
    """Paint one shape per clip over `video` (B, T, 3, H, W); `shapes` are host indices."""
    height, width = video.shape[-2:]
    centre = path(thing, t, frame, scale)  # (B, T, 2)
    radius = thing.radius[:, None] * frame.min() * scale  # (B, T)
    angle = thing.angle[:, None] + thing.spin[:, None] * t
    squash = 1 + thing.wobble[:, None] * torch.sin(thing.wobble_rate[:, None] * t)

    def expand(value):
        return value[..., None, None]

    dx = torch.arange(width, device=video.device) + 0.5 - expand(centre[..., 0])  # (B, T, 1, W)
    dy = torch.arange(height, device=video.device)[:, None] + 0.5 - expand(centre[..., 1])
    cos, sin = expand(angle.cos() / radius), expand(angle.sin() / radius)
    x = (cos * dx + sin * dy) / expand(squash)  # (B, T, H, W)
    y = (cos * dy - sin * dx) * expand(squash)
    distance = torch.empty_like(x)
    for shape in range(len(SHAPES)):
        rows = (shapes == shape).nonzero()[:, 0].to(video.device)
        distance[rows] = signed_distance(shape, x[rows], y[rows])
    alpha = (0.5 - distance * expand(radius)).clamp(0, 1)
    alpha = (alpha * visible[:, None, None, None])[:, :, None]  # (B, T, 1, H, W)

    return torch.lerp(video, surface(thing, x, y), alpha)


def surface(thing, x, y):
    """Colour (B, T, 3, H, W) of a shape with its stripes or spots, at its own coordinates."""
    k = thing.pattern_scale[:, None, None, None]
    stripes, spots = torch.sin(2 * k * x), 3 * torch.sin(k * x) * torch.sin(k * y) - 0.8
    pattern = thing.pattern[:, None, None, None]
    marks = torch.where(pattern == 1, stripes, spots).mul(4).sigmoid() * (pattern > 0)
    colour = torch.tensor(list(COLOURS.values()), device=x.device)[thing.colour] + thing.tint
    return colour[:, None, :, None, None] * (1 - 0.45 * marks[:, :, None])


def camera_path(scene, t):
    """Offset of the background in pixels (B, T, 2) and scale of the scene (B, T)."""
    progress = t / max(len(t) - 1, 1)
    pan = torch.cat([HEADINGS[4:], HEADINGS[:4], HEADINGS[4:], HEADINGS[4:]]).to(t.device)
    offset = pan[scene.camera][:, None] * (scene.camera_speed[:, None] * TOKEN * t)[..., None]
    zoom_in, zoom_out = (scene.camera == CAMERAS.index(f"zooms {way}") for way in ("in", "out"))
    amount = zoom_in[:, None] * progress + zoom_out[:, None] * (1 - progress)
    return offset, 1 + scene.zoom[:, None] * amount


def draw_background(scene, offset, scale, height, width, noise):
    """Periodic texture with a 1/f amplitude spectrum, seen by the camera: (B, T, 3, H, W)."""
    count, frames, side = *scale.shape, noise.shape[-1]
    device = scale.device
    fy, fx = torch.fft.fftfreq(side, device=device), torch.fft.rfftfreq(side, device=device)
    frequency = torch.hypot(fy[:, None], fx).clamp(min=1 / side)  # (S, S/2+1)
    spectrum = torch.fft.rfft2(noise) / frequency ** scene.steepness[:, None, None, None]
    spectrum[..., 0, 0] = 0
    texture = torch.fft.irfft2(spectrum, s=(side, side))  # (B, 4, S, S)
    texture = texture / texture.std((-2, -1), keepdim=True)
    texture = texture[:, :1] + 0.2 * texture[:, 1:]  # mostly brightness, a little hue
    base = torch.tensor(list(BACKGROUNDS.values()), device=device)[scene.background]
    texture = base[:, :, None, None] + scene.contrast[:, None, None, None] * texture

    def coordinates(size, shift):
        pixel = torch.arange(size, device=device) + 0.5 - size / 2
        return (pixel / scale[..., None] + size / 2 + shift[..., None]) % side  # (B, T, size)

    x, y = coordinates(width, offset[..., 0]), coordinates(height, offset[..., 1])
    grid = torch.stack([
        x[:, :, None].expand(-1, -1, height, -1), y[..., None].expand(-1, -1, -1, width)
    ], -1)  # fmt: skip
    padded = F.pad(texture, (1, 1, 1, 1), mode="circular")
    grid = (grid + 1) * (2 / (side + 2)) - 1
    view = F.grid_sample(
        padded, grid.reshape(count, frames * height, width, 2), align_corners=False
    )
    return view.reshape(count, 3, frames, height, width).transpose(1, 2)


def draw_pillar(video, scene, offset, side):
    """A grey pillar fixed in the scene, in front of everything."""
    width = video.shape[-1]
    place = (scene.pillar_place[:, None] * width - offset[..., 0] + side / 4) % side - side / 4
    dx = torch.arange(width, device=video.device) + 0.5 - place[..., None]  # (B, T, W)
    half = (scene.pillar_width * width)[:, None, None]
    alpha = (0.5 + half - dx.abs()).clamp(0, 1) * scene.pillar[:, None, None]
    shade = 0.62 - 0.22 * (dx / half).clamp(-1, 1) ** 2
    return torch.lerp(video, shade[:, :, None, None], alpha[:, :, None, None])


def light(scene, t):
    """Brightness of each frame (B, T)."""
    kind, depth = scene.light[:, None], scene.light_depth[:, None]
    flicker = 1 - depth * (torch.sin(scene.light_rate[:, None] * t) * 0.5 + 0.5)
    fade = 1 - depth * t / max(len(t) - 1, 1)
    return torch.where(kind == 1, flicker, torch.where(kind == 2, fade, 1.0))


def move(settings, device):
    return SimpleNamespace(**{k: v.to(device) for k, v in vars(settings).items()})


@torch.no_grad()
def draw_clips(
    count, frames, height, width, generator, device="cpu", table=None, top_speed=4.0,
    draw=draw_object, ending="", **odds,
):  # fmt: skip
    """Draw `count` clips from a CPU `generator`.

    Returns video (B, T, 3, H, W) in [-1, 1], captions, and labels (B, 4) on the CPU: colour,
    shape, direction and speed of the main object, whose speed is -1 where it stands still.
    `table` lists the triples that may be drawn (default: those not held out), `top_speed` is in
    tokens a frame; `draw` paints a shape, and captions get an `ending` that names such a way to
    paint; `odds` go to `roll_scene`.
    """
    dice = Dice(count, generator)
    table = triples()[len(holdout()) :] if table is None else table
    main, other = (roll_object(dice, height, width, table, top_speed) for _ in range(2))
    scene = roll_scene(dice, **odds)
    luck = torch.rand(count, 24, generator=generator).tolist()
    listed = [vars_to_lists(thing) for thing in (main, other, scene)]
    captions = [write_caption(*listed, i, iter(luck[i]).__next__) + ending for i in range(count)]
    speed = (main.speed >= FAST).long().where(main.speed > 0, -1)
    labels = torch.stack([main.colour, main.shape, main.direction, speed], 1)

    seed = int(torch.randint(2**62, (1,), generator=generator))
    side = 2 * max(height, width)
    noise = torch.randn(
        count, 4, side, side, device=device, generator=torch.Generator(device).manual_seed(seed)
    )
    shapes = main.shape, other.shape
    main, other, scene = (move(settings, device) for settings in (main, other, scene))
    t = torch.arange(frames, device=device, dtype=torch.float32)
    frame = torch.tensor([float(width), float(height)], device=device)
    offset, scale = camera_path(scene, t)
    video = draw_background(scene, offset, scale, height, width, noise)
    under, over = scene.second & ~scene.second_on_top, scene.second & scene.second_on_top
    video = draw(video, other, shapes[1], t, frame, scale, under)
    video = draw(video, main, shapes[0], t, frame, scale, torch.ones_like(under))
    video = draw(video, other, shapes[1], t, frame, scale, over)
    video = draw_pillar(video, scene, offset, side)
    video = video * light(scene, t)[..., None, None, None]
    return video.clamp(0, 1) * 2 - 1, captions, labels
