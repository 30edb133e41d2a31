"""Our attention processor in the place of another one, also while diffusers fuses projections."""

from collections.abc import Callable
from functools import wraps
from typing import Any


class Swap:
    """Puts our processor on an attention module, and takes it off again.

    Our processor finds the one it stands for in `before`, and takes over its attention backend.

    Args:
        module: the attention module.
        ours: our processor.
    """

    def __init__(self, module: Any, ours: Any):
        self.module, self.ours = module, ours
        self.put_on()

    @property
    def is_on(self) -> bool:
        return self.module.processor is self.ours

    def put_on(self) -> None:
        before = self.module.processor
        self.ours.before = before
        self.ours._attention_backend = getattr(before, "_attention_backend", None)
        _set_processor(self.module, self.ours)

    def take_off(self) -> None:
        if self.is_on:
            if hasattr(self.ours.before, "_attention_backend"):
                self.ours.before._attention_backend = self.ours._attention_backend
            _set_processor(self.module, self.ours.before)


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # Mochi's attention keeps it as an attribute alone
        module._modules.pop("processor", None)  # of one with weights; set_processor does the same
        module.processor = processor


def keep_through_fusion(transformer: Any, swaps: list[Swap]) -> Callable[[], None]:
    """Shadow fusing and unfusing of projections on the instance; returns how to undo it.

    CogVideoX sets a processor of its own when it fuses, remembers those it found, and sets them
    again when it unfuses. Ours step aside meanwhile: it neither drops nor remembers them.
    """

    def aside(original: Callable[[], None]) -> Callable[[], None]:
        @wraps(original)
        def fuse_or_unfuse() -> None:
            on = [swap for swap in swaps if swap.is_on]
            for swap in on:
                swap.take_off()
            try:
                original()
            finally:
                for swap in on:
                    swap.put_on()

        return fuse_or_unfuse

    names = ("fuse_qkv_projections", "unfuse_qkv_projections")
    shadows = {n: aside(getattr(transformer, n)) for n in names if hasattr(transformer, n)}
    vars(transformer).update(shadows)

    def undo() -> None:
        for name in shadows:
            vars(transformer).pop(name, None)

    return undo
