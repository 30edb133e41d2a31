"""diffusers' context parallelism beside ours: what is accepted, and whose hooks split the tokens.

diffusers splits by hooks of its own, in raster order. Ours split too, in block order, so that its
hooks are put aside meanwhile.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from torch import nn

from .ulysses import Ulysses

HOOKS = ("cp_input---", "cp_output---")  # how diffusers begins the names of its own


def ulysses_of(transformer: nn.Module) -> Ulysses | None:
    """The processes that share this transformer's calls, None where it runs alone."""
    config = getattr(transformer, "_parallel_config", None)
    if config is None:
        return None
    refuse_other_parallelism(config)
    return Ulysses.of(_context(config)._ulysses_mesh.get_group())


def refuse_other_parallelism(config: Any) -> None:
    context = _context(config)
    if context is None:
        raise RuntimeError(
            "sparse attention runs on several GPUs by Ulysses alone, not by tensor parallelism:"
            " use ContextParallelConfig(ulysses_degree=N)"
        )
    if context.ring_degree > 1:
        raise RuntimeError(
            "sparse attention does not support ring attention, which never has all keys of a head"
            " in one place: use ContextParallelConfig(ulysses_degree=N) without ring_degree"
        )


def degree_of(config: Any) -> int:
    return _context(config).ulysses_degree


def refuse_heads(attentions: Iterable[Any], degree: int) -> None:
    for heads in {module.heads for module in attentions}:
        if heads % degree:
            fitting = [str(n) for n in range(2, heads + 1) if heads % n == 0]
            raise ValueError(
                f"ulysses_degree={degree} does not divide the {heads} heads of this transformer:"
                f" use one of {', '.join(fitting)}"
            )


def _context(config: Any) -> Any:
    """The part of a ParallelConfig that is for context parallelism, None where there is none."""
    return config if hasattr(config, "ring_degree") else config.context_parallel_config


def lift_hooks(transformer: nn.Module) -> Callable[[], None]:
    """Take diffusers' hooks of context parallelism off; returns how to put them on again."""
    lifted = []
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in [] if registry is None else list(registry.hooks):
            if name.startswith(HOOKS):
                lifted.append((registry, registry.hooks[name], name))
                registry.remove_hook(name, recurse=False)

    def put_back() -> None:
        for registry, hook, name in lifted:
            registry.register_hook(hook, name)

    return put_back


def follow_parallelism(
    transformer: Any, check: Callable[[Any], None], off: Callable[[], None], on: Callable[[], None]
) -> Callable[[], None]:
    """Shadow `enable_parallelism` on the instance, to work after enabling; returns how to undo it.

    Args:
        check: refuses a config that cannot be.
        off, on: take sparse attention off, and put it on again.
    """
    original = getattr(transformer, "enable_parallelism", None)
    if original is None:
        return lambda: None

    @wraps(original)
    def enable_parallelism(*, config: Any, cp_plan: Any = None) -> None:
        check(config)
        if cp_plan is None and transformer._cp_plan is None:
            cp_plan = {}  # no hooks: diffusers cannot split this model, and need not
        off()
        try:
            original(config=config, cp_plan=cp_plan)
        finally:
            on()

    vars(transformer)["enable_parallelism"] = enable_parallelism
    return lambda: vars(transformer).pop("enable_parallelism", None)
