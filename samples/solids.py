"""A second kind of clip: the shapes as thick solids that turn in the light and throw a shadow.

    python samples/solids.py sheet.png

Rays run straight into the picture and march through signed distances. Everything else, motion and
camera included, is that of `clips.py`; captions end in "in the light".
"""

import argparse
from functools import partial

import torch
from clips import SHAPES, draw_clips, path, signed_distance, surface

LIGHT = (-0.45, -0.62, 0.64)  # towards the light: left, up, and to the viewer
THICKNESS, ROUNDING, WALL = 0.30, 0.05, -1.7  # in radii
SIGHT_STEPS, SHADOW_STEPS, CLOSE = 24, 14, 0.005


class Pose:
    """Where a solid is and how it is turned, in each frame (B, T, 1, 1)."""

    def __init__(self, thing, t):
        roll = thing.angle[:, None] + thing.spin[:, None] * t
        yaw = 0.8 * torch.sin(thing.phase[:, None] + 0.35 * t)
        squash = 1 + thing.wobble[:, None] * torch.sin(thing.wobble_rate[:, None] * t)
        self.roll, self.yaw, self.squash = (x[..., None, None] for x in (roll, yaw, squash))

    def own(self, x, y, z):
        """From the picture's coordinates, in radii, to the solid's."""
        sin, cos = self.yaw.sin(), self.yaw.cos()
        x, z = cos * x - sin * z, sin * x + cos * z
        sin, cos = self.roll.sin(), self.roll.cos()
        x, y = cos * x + sin * y, cos * y - sin * x
        return x / self.squash, y * self.squash, z

    def distance(self, shape, x, y, z):
        """Signed distance to the shape made thick, never more than the true one."""
        x, y, z = self.own(x, y, z)
        flat, deep = signed_distance(shape, x, y), z.abs() - THICKNESS
        outside = torch.hypot(flat.clamp(min=0), deep.clamp(min=0))
        return 0.75 * (outside + torch.maximum(flat, deep).clamp(max=0) - ROUNDING)


def march(distance, x, y, z, way, steps, softness=None):
    """Follow rays from (x, y, z): where they end, and how near to the solid they came.

    With a `softness`, nearness is relative to the way gone: the half-shadow of a wide light.
    """
    gone, nearest = torch.zeros_like(x), torch.full_like(x, 9.0)
    for _ in range(steps):
        free = distance(x + gone * way[0], y + gone * way[1], z + gone * way[2])
        nearest = torch.minimum(
            nearest, free if softness is None else softness * free / (gone + 0.1)
        )
        gone = gone + free * (free > CLOSE)  # stays at the surface
    return x + gone * way[0], y + gone * way[1], z + gone * way[2], nearest


def slope(distance, x, y, z):
    """Unit normals of the surface, three tensors."""
    here, step = distance(x, y, z), 0.02
    gradient = torch.stack([
        distance(x + step, y, z) - here, distance(x, y + step, z) - here,
        distance(x, y, z + step) - here,
    ])  # fmt: skip
    return gradient / gradient.norm(dim=0).clamp(min=1e-6)


def draw_solid(video, thing, shapes, t, frame, scale, visible):
    """Paint one solid per clip, with its shadow, over `video` (B, T, 3, H, W)."""
    video, shapes = video.clone(), shapes.to(video.device)
    for shape in range(len(SHAPES)):
        rows = ((shapes == shape) & visible).nonzero()[:, 0]
        if len(rows):
            some = type(thing)(**{name: value[rows] for name, value in vars(thing).items()})
            video[rows] = draw_same(video[rows], some, shape, t, frame, scale[rows])
    return video


def draw_same(video, thing, shape, t, frame, scale):
    """`draw_solid` for clips of one shape."""
    height, width = video.shape[-2:]
    radius = (thing.radius[:, None] * frame.min() * scale)[..., None, None]  # (B, T, 1, 1)
    centre = path(thing, t, frame, scale)[..., None, None]  # (B, T, 2, 1, 1)
    x = torch.arange(width, device=video.device) + 0.5 - centre[:, :, 0]
    y = torch.arange(height, device=video.device)[:, None] + 0.5 - centre[:, :, 1]
    x, y = torch.broadcast_tensors(x / radius, y / radius)  # (B, T, H, W)
    pose, far = Pose(thing, t), torch.full_like(x, 1.6)
    distance = partial(pose.distance, shape)

    hit_x, hit_y, hit_z, near = march(distance, x, y, far, (0.0, 0.0, -1.0), SIGHT_STEPS)
    normal = slope(distance, hit_x, hit_y, hit_z)
    facing = sum(n * way for n, way in zip(normal, LIGHT)).clamp(min=0)
    shine = (2 * facing * normal[2] - LIGHT[2]).clamp(0, 1) ** 24
    paint = surface(thing, *pose.own(hit_x, hit_y, hit_z)[:2])
    paint = paint * (0.4 + 0.7 * facing)[:, :, None] + 0.35 * shine[:, :, None]

    shade = march(distance, x, y, torch.full_like(x, WALL), LIGHT, SHADOW_STEPS, softness=6.0)[3]
    video = video * (1 - 0.55 * (1 - shade.clamp(0, 1)))[:, :, None]
    alpha = (1.2 - near * radius).clamp(0, 1)
    return torch.lerp(video, paint.clamp(0, 1), alpha[:, :, None])


draw_solids = partial(draw_clips, draw=draw_solid, ending=", in the light")


def main():
    from prompt_check import contact_sheet

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sheet", help="PNG file of some clips; their captions are printed")
    args = parser.parse_args()
    video, captions, _ = draw_solids(8, 17, 128, 128, torch.Generator().manual_seed(0))
    contact_sheet(video, args.sheet)
    print(*captions, sep="\n")


if __name__ == "__main__":
    main()
