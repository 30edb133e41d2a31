"""What the drawn clips may show, chosen at random, and the captions that say it."""

import math
from types import SimpleNamespace

import torch

TOKEN = 8
COLOURS = {
    "red": (0.90, 0.10, 0.12), "green": (0.15, 0.80, 0.20), "blue": (0.12, 0.30, 0.95),
    "yellow": (0.98, 0.90, 0.10), "orange": (1.00, 0.50, 0.05), "pink": (1.00, 0.35, 0.75),
    "cyan": (0.10, 0.88, 0.92), "white": (0.98, 0.98, 0.98),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIRECTIONS = ("left", "right", "up", "down", "still")
BACKGROUNDS = {
    "dark blue": (0.10, 0.13, 0.30), "sand": (0.58, 0.51, 0.38), "grey": (0.42, 0.43, 0.44),
    "dark green": (0.10, 0.25, 0.13), "purple": (0.29, 0.14, 0.33), "brown": (0.34, 0.21, 0.13),
}  # fmt: skip
CAMERAS = ("fixed", "pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out")
HEADINGS = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [0.0, 0.0]])  # x, y
EXTRA_WORDS = (
    "a an small large striped spotted moving moves standing stands slowly quickly very fast "
    "spinning wobbling in front of behind pillar over background the camera light "
    "flickers fades , and"
)


def triples():
    """All (colour, shape, direction) index triples, shuffled once and for all."""
    grid = torch.cartesian_prod(*map(torch.arange, (len(COLOURS), len(SHAPES), len(DIRECTIONS))))
    return grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(240))]


def holdout():
    """The quarter of the triples that no training clip shows."""
    return triples()[: len(triples()) // 4]


def vocabulary():
    """Every word that a caption can contain."""
    text = " ".join((*COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS, *CAMERAS[1:], EXTRA_WORDS))
    return sorted(set(text.split()))


# ------------------------------------------------------------------------------ random settings


class Dice:
    """Random per-clip settings, drawn on the CPU so that captions need no device sync."""

    def __init__(self, count, generator):
        self.count, self.generator = count, generator

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(self.count, generator=self.generator)

    def chance(self, probability):
        return self.uniform() < probability

    def pick(self, number):
        return torch.randint(number, (self.count,), generator=self.generator)

    def sign(self):
        return self.pick(2) * 2.0 - 1


def roll_object(dice, height, width, table, top_speed):
    """Settings of one shape per clip; `table` (N, 3) lists the allowed triples."""
    colour, shape, direction = table[dice.pick(len(table))].unbind(1)
    moving = direction != DIRECTIONS.index("still")
    speed = (0.3 + (top_speed - 0.3) * dice.uniform() ** 1.5) * moving  # more slow ones
    frame = torch.tensor([float(width), float(height)])
    return SimpleNamespace(
        colour=colour,
        shape=shape,
        direction=direction,
        speed=speed,
        radius=dice.uniform(0.12, 0.24),
        middle=torch.stack([dice.uniform(0.25, 0.75), dice.uniform(0.25, 0.75)], 1) * frame,
        phase=dice.uniform(0, 2 * math.pi),
        acceleration=dice.uniform(-0.6, 0.6) * dice.chance(0.3),
        sway=dice.uniform(0.03, 0.12) * dice.chance(0.3) * moving,
        sway_turns=dice.uniform(0.5, 1.5),
        angle=dice.uniform(-0.3, 0.3),
        spin=dice.uniform(0.05, 0.30) * dice.sign() * dice.chance(0.5),  # radians per frame
        wobble=dice.uniform(0.12, 0.30) * dice.chance(0.3),
        wobble_rate=dice.uniform(0.3, 0.9),
        pattern=(dice.pick(2) + 1) * dice.chance(0.35),  # 0 plain, 1 striped, 2 spotted
        pattern_scale=dice.uniform(3.5, 6.0),
        tint=torch.randn(dice.count, 3, generator=dice.generator) * 0.02,
    )


def roll_scene(dice, camera=0.5, second=0.3, pillar=0.12, light=0.12, contrast=0.2):
    """Settings of everything else: camera, background, second shape, pillar, light."""
    camera = (dice.pick(len(CAMERAS) - 1) + 1) * dice.chance(camera)
    return SimpleNamespace(
        camera=camera,
        camera_speed=dice.uniform(0.2, 2.5),  # tokens per frame
        zoom=dice.uniform(0.3, 0.7),
        background=dice.pick(len(BACKGROUNDS)),
        contrast=dice.uniform(0.45, 1.0) * contrast,
        steepness=dice.uniform(1.0, 1.4),
        second=dice.chance(second),
        second_on_top=dice.chance(0.3),
        pillar=dice.chance(pillar) & (camera < CAMERAS.index("zooms in")),
        pillar_place=dice.uniform(0.3, 0.7),
        pillar_width=dice.uniform(0.05, 0.10),
        light=(dice.pick(2) + 1) * dice.chance(light),  # 0 steady, 1 flickers, 2 fades
        light_depth=dice.uniform(0.25, 0.5),
        light_rate=dice.uniform(0.8, 2.5),
    )


# ------------------------------------------------------------------------------------- captions


def speed_words(speed):
    return ("slowly", "", "quickly", "very fast")[min(max(math.ceil(speed) - 1, 0), 3)]


def describe(thing, i, keep, verb):
    """'a large striped red star moving left quickly, spinning', extras kept if `keep()`."""
    size = "small" if thing.radius[i] < 0.15 else "large" if thing.radius[i] > 0.21 else ""
    pattern = ("", "striped", "spotted")[thing.pattern[i]]
    direction = DIRECTIONS[thing.direction[i]]
    motion = ("standing" if verb == "moving" else "stands") if direction == "still" else verb
    words = [
        size if keep() else "", pattern if keep() else "", list(COLOURS)[thing.colour[i]],
        SHAPES[thing.shape[i]], motion, direction,
        speed_words(thing.speed[i]) if direction != "still" and keep() else "",
    ]  # fmt: skip
    turns = ["spinning"] * bool(thing.spin[i]) + ["wobbling"] * bool(thing.wobble[i])
    tail = ", " + " and ".join(turns) if turns and keep() else ""
    text = " ".join(filter(None, words))
    return ("an " if text[0] == "o" else "a ") + text + tail


def write_caption(main, other, scene, i, random):
    """One caption; a third are short, a third full, the rest drop words at random."""
    detail = (0.0, 0.5, 1.0)[int(random() * 3)]

    def keep():
        return random() < detail

    verb = "moving" if random() < 0.6 else "moves"
    text = describe(main, i, keep, verb)
    if scene.second[i]:
        side = "behind" if scene.second_on_top[i] else "in front of"
        text += f" {side} {describe(other, i, lambda: False, 'moving')}"
    if scene.pillar[i]:
        text += " behind a grey pillar"
    ground = f"over a {list(BACKGROUNDS)[scene.background[i]]} background"
    if keep():
        text = f"{text} {ground}" if random() < 0.8 else f"{ground} , {text}"
    if scene.camera[i] and keep():
        text += f" , the camera {CAMERAS[scene.camera[i]]}"
    if scene.light[i] and keep():
        text += f" , the light {('', 'flickers', 'fades')[scene.light[i]]}"
    return text.replace(" ,", ",")


def vars_to_lists(settings):
    """Plain Python numbers: thousands of captions are slow to write from tensors."""
    return SimpleNamespace(**{k: v.tolist() for k, v in vars(settings).items()})
