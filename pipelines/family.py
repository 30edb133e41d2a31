"""What the library must know of a model family."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..grid import VideoGrid

Undo = Callable[[], None]


class CurrentCall(Protocol):
    """What a hook inside the transformer may ask of the call that runs."""

    @property
    def grid(self) -> VideoGrid: ...

    @property
    def split(self) -> bool:
        """Whether several processes share the call, each with a part of the video tokens."""

    def order(self, like: Tensor) -> Tensor | None:
        """The video tokens of this process in block order, as indices into the raster on a tensor's
        device; None for all of them in raster order."""

    def restored(self, x: Tensor) -> Tensor:
        """Video tokens (B, tokens of this process, C) -> (B, all tokens, C) in raster order."""

    def first_of(self, tokens: int) -> int:
        """How many of the first `tokens` are among those of this process."""

    def order_in_layers(self) -> None:
        """Let each layer put its own tokens in block order and back: where a model slices tokens
        by frame between its layers, they must stay in raster order there."""


@dataclass(frozen=True)
class Prepared:
    """What a family reads from the inputs of a call, before it runs.

    Attributes:
        lengths: valid tokens of each sample where padded text is left and they differ.
        changed: inputs to pass instead of those given.
        per_token: names of inputs that hold a tuple of (video tokens, D) tables, such as RoPE.
        latent_patch: where the latent video (B, C, T, H, W) is put in block order instead of its
            tokens, the size of the patches that become tokens.
    """

    grid: VideoGrid
    lengths: tuple[int, ...] | None = None
    changed: dict[str, Any] = field(default_factory=dict)
    per_token: tuple[str, ...] = ()
    latent_patch: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of a family, and the few functions that differ between families.

    Attributes:
        transformers: class names; a subclass belongs to the family too.
        pipelines: class names of the diffusers pipelines that use them.
        guidance: how classifier-free guidance reaches the transformer.
        text: where the text tokens stand.
        fps: frames per second that the models were trained on.
        stock_processor: class name of diffusers' own attention processor.
        fused_processor: of that for fused projections, where it is another.
        processor: class of the attention processor, built with the slot of its layer, with a
            method `dense` (query, key, value, kv_len) -> output on (B, S, H, D). The processor it
            stands for is put on it as `before`.
        prepare: (transformer, inputs by name, keep_padding) -> Prepared.
        self_attentions: transformer -> its self-attention modules, in the order of the layers.
        hooks: installs the hooks of the token order (and of dropped text) one by one, yields how
            to undo each.
        splits: whether the hooks of the token order can also split the tokens over several GPUs.
        tested: on which weights the tests run it.
    """

    name: str
    transformers: tuple[str, ...]
    pipelines: tuple[str, ...]
    guidance: str
    text: str
    fps: float
    stock_processor: str
    fused_processor: str | None = None
    processor: type
    prepare: Callable[[Any, dict[str, Any], bool], Prepared]
    self_attentions: Callable[[nn.Module], Iterable[nn.Module]]
    hooks: Callable[[Any, CurrentCall], Iterable[Undo]]
    splits: bool = True
    tested: str = "tiny random"


REFUSED = {  # transformers that look as if they were supported, and why they are not
    "WanAnimate2Transformer3DModel": "it attends to generated and reference tokens together,"
    " through a mask of its own, and not over one grid of video tokens",
    "HunyuanVideoFramepackTransformer3DModel": "earlier frames, shrunk to three sizes, stand in"
    " front of the video, so that it does not attend over one grid of video tokens",
}


def families() -> tuple[Family, ...]:
    from .cogvideox import COGVIDEOX
    from .hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
    from .ltx_video import LTX_VIDEO
    from .mochi import MOCHI
    from .skyreels_v2 import SKYREELS_V2
    from .wan import WAN
    from .wan_animate import WAN_ANIMATE

    return (
        WAN,
        WAN_ANIMATE,
        HUNYUAN_VIDEO,
        HUNYUAN_VIDEO_15,
        COGVIDEOX,
        LTX_VIDEO,
        MOCHI,
        SKYREELS_V2,
    )


def family_of(transformer: nn.Module) -> Family | None:
    names = {cls.__name__ for cls in type(transformer).__mro__}
    return next((f for f in families() if names & set(f.transformers)), None)


def refusal_of(module: nn.Module) -> str | None:
    """Why a transformer is refused, None where nothing special is known of it."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((f"{name}: {REFUSED[name]}" for name in names if name in REFUSED), None)
