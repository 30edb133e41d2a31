"""What the library must know of a model family."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..grid import VideoGrid

Undo = Callable[[], None]


@dataclass(frozen=True)
class Family:
    """Facts of a family, and the few functions that differ between families.

    Attributes:
        transformers: class names, matched along the class hierarchy.
        pipelines: class names of the diffusers pipelines that use them.
        guidance: how classifier-free guidance reaches the transformer.
        fps: frames per second that the models were trained on.
        stock_processor: class name of diffusers' own attention processor.
        processor: class of the attention processor, built with the slot of its layer, with a
            method `dense` (query, key, value) -> output on (B, S, H, D).
        grid: (transformer, hidden_states) -> VideoGrid of that call.
        self_attentions: transformer -> its self-attention modules, in the order of the layers.
        reorder_tokens: installs the hooks of the token order one by one, yields how to undo each.
    """

    name: str
    transformers: tuple[str, ...]
    pipelines: tuple[str, ...]
    guidance: str
    fps: float
    stock_processor: str
    processor: type
    grid: Callable[[nn.Module, Tensor], VideoGrid]
    self_attentions: Callable[[nn.Module], Iterable[nn.Module]]
    reorder_tokens: Callable[[nn.Module, Callable], Iterable[Undo]]


def families() -> tuple[Family, ...]:
    from .wan import WAN

    return (WAN,)


def family_of(transformer: nn.Module) -> Family | None:
    names = {cls.__name__ for cls in type(transformer).__mro__}
    return next((f for f in families() if names & set(f.transformers)), None)
