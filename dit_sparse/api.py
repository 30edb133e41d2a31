"""`enable_sparse_attention` and its undo."""

import difflib
import inspect
import logging
import os
from contextlib import ExitStack
from functools import lru_cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .attention import refuse_missing
from .caches import refuse_faster_cache, refuse_shared_broadcast
from .config import SparseConfig, flag, whole
from .defaults import torch_defaults
from .denoising import Denoising
from .grid import VideoGrid, order_patches, token_order
from .one_thread import OneThread
from .parallelism import (
    degree_of,
    follow_parallelism,
    put_aside,
    refuse_heads,
    refuse_other_parallelism,
    ulysses_of,
)
from .patterns import METHODS, method_class
from .pipelines.family import Family, Prepared, Undo, families, family_of, refusal_of
from .preset import SUFFIX, read_preset
from .report import Report, make_report
from .state import Call, State
from .step import LayerAttention, register_layer
from .swap import Swap, keep_through_fusion

logger = logging.getLogger(__name__)

CHANGED = (
    "size, dtype, device or number of steps changed before step {} (from 0): what was found was"
    " dropped, and the report is of the steps since then"
)
_HANDLE = "_dit_sparse_handle"  # attribute of a transformer that runs sparse


class UnsupportedPipelineError(TypeError):
    """The object is no pipeline or transformer whose self-attention we know."""


def enable_sparse_attention(
    pipe: Any,
    method: str | SparseConfig = "auto",
    *,
    measure: bool = False,
    num_steps: int | None = None,
    keep_padding: bool = False,
    **options: Any,
) -> "SparseAttention":
    """Make the self-attention of a pipeline's transformers sparse, in place.

    Enabling again replaces the method. Call it before `torch.compile`. Inference only. With
    DIT_SPARSE=0 in the environment it changes nothing and says so; the variable is read here alone.

    Args:
        pipe: a diffusers pipeline (`supported_pipelines()`), or one of its transformers.
        method: a name out of `available_methods()`, a config such as `AdaSpa(density=0.3)`, a
            preset of `dit-sparse calibrate --psnr`, such as "preset.json", or a Python file with a
            rule of your own, such as "my_rule.py".
        measure: also measure the kept softmax mass at every sparse step (a few percent slower).
        num_steps: denoising steps in all; only needed for a bare transformer.
        keep_padding: keep the padded text of HunyuanVideo and Mochi, masked as in the stock
            pipeline. It is dropped by default: the same in mathematics, not in bits, and faster.
        options: fields of the method's config, such as `density=0.3`, or with "auto" a `target`:
            "fidelity", "balanced" or "speed".

    Returns:
        A handle with `report()` and `disable()`; as a context manager it disables at the end.

    Raises:
        UnsupportedPipelineError: nothing in `pipe` is supported.
        ValueError: an unknown method, an argument or option with a value that is not allowed, a
            file that is missing or of another model, or a forced engine that cannot run here.
        TypeError: an option that the method does not have.
        RuntimeError: the transformer is compiled, has FasterCache, or is shared by several GPUs
            otherwise than by Ulysses.
    """
    config, name = make_config(method, options)
    flag("measure", measure)
    flag("keep_padding", keep_padding)
    if num_steps is not None:
        whole("num_steps", num_steps, 1)
    if config.engine != "auto":
        refuse_missing(config.engine, "cuda" if torch.cuda.is_available() else "cpu")
    transformers = supported_transformers(pipe)
    config = config.for_model([transformer for transformer, _ in transformers])
    if os.environ.get("DIT_SPARSE") == "0":
        handle = SparseAttention([], pipe, name, config, measure, num_steps, keep_padding)
        handle.note("DIT_SPARSE=0 in the environment: attention stays dense")
        return handle
    _refuse_compiled(pipe)
    for transformer, _ in transformers:
        refuse_faster_cache(transformer)
    for handle in _handles(pipe):
        handle.disable()
        if handle.enabled_on() is not pipe:
            handle.note("sparse attention was enabled again on a shared transformer: replaced")
    return SparseAttention(transformers, pipe, name, config, measure, num_steps, keep_padding)


def disable_sparse_attention(pipe: Any) -> None:
    """Undo `enable_sparse_attention`; does nothing where it is not enabled."""
    for handle in _handles(pipe):
        handle.disable()


def supported_pipelines() -> dict[str, tuple[str, ...]]:
    """Names of the diffusers pipelines of each supported family."""
    return {family.name: family.pipelines for family in families()}


def available_methods() -> dict[str, type[SparseConfig]]:
    """The config class of each method, by its name."""
    return dict(METHODS)


class SparseAttention:
    """Handle of sparse attention on a pipeline; made by `enable_sparse_attention`."""

    def __init__(
        self,
        transformers: list[tuple[nn.Module, Family]],
        pipe: Any,
        method: str,
        config: SparseConfig,
        measure: bool,
        num_steps: int | None,
        keep_padding: bool,
    ):
        self.method, self.config, self.enabled_on = method, config, ref(pipe)
        self.keep_padding = keep_padding
        self._notes: list[str] = []
        self._told: set[str] = set()
        self._installed: list[Installation] = []
        with ExitStack() as undo:  # all transformers or none
            for transformer, family in transformers:
                installed = Installation(self, transformer, family, pipe, measure, num_steps)
                undo.callback(installed.remove)
                self._installed.append(installed)
            self._undo = undo.pop_all()

    @property
    def enabled(self) -> bool:
        on = [vars(i.transformer).get(_HANDLE) is self for i in self._installed]
        return bool(on) and all(on)  # none are installed with DIT_SPARSE=0

    def report(self) -> Report:
        """Figures of the last generation; kept after `disable`."""
        return make_report(
            self.method,
            self.config.to_dict(),
            [installed.state for installed in self._installed],
            [len(installed.swaps) for installed in self._installed],
            self._notes,
        )

    def forget_other_runs(self, step: int) -> None:
        """A run begins: a transformer that has no part in it must not be in its report.

        One that is further than `step` is left from a run that failed.
        """
        for state in (installed.state for installed in self._installed):
            if not state.last or max(call.step for call in state.last.values()) > step:
                state.drop()
                state.forget()

    def disable(self) -> None:
        """Leave the pipeline as it was; does nothing the second time."""
        self._undo.close()

    def __enter__(self) -> "SparseAttention":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def __reduce__(self) -> Any:
        raise RuntimeError(
            "sparse attention is enabled: disable it before you copy or pickle the transformer, and"
            " enable it again on both"
        )

    def note(self, text: str, state: State | None = None) -> None:
        """Warn once, and say it in every report, or in that of a transformer's run."""
        notes = self._notes if state is None else state.notes
        if text not in notes:
            notes.append(text)
        if text not in self._told:
            self._told.add(text)
            logger.warning(text)


class Installation:
    """Processors and hooks on one transformer, and how to take them off again."""

    def __init__(
        self,
        handle: SparseAttention,
        transformer: nn.Module,
        family: Family,
        pipe: Any,
        measure: bool,
        num_steps: int | None,
    ):
        self.handle, self.transformer, self.family = handle, transformer, family
        self.config = handle.config
        hosts: dict | None = {} if self.config.cache_device == "cpu" else None
        self.state = State(hosts=hosts, shares=self.config.share_guidance)
        self.denoising, self.one_thread = Denoising(pipe, num_steps), OneThread(pipe)
        self.argument_names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.layers: list[LayerAttention] = []  # the operator finds them by weak references
        self.swaps: list[Swap] = []
        self.measure = measure
        self._inside = False  # a call of a loop of the user's own; its error ends a run
        with ExitStack() as undo:
            vars(transformer)[_HANDLE] = handle
            undo.callback(vars(transformer).pop, _HANDLE)
            follows = follow_parallelism(transformer, self._check_parallelism, self.off, self.on)
            undo.callback(follows)
            self.on()
            undo.callback(self.off)
            self._undo = undo.pop_all()

    def on(self) -> None:
        transformer, family = self.transformer, self.family
        self.layers.clear()
        self.swaps.clear()
        with ExitStack() as undo:  # what is done so far is undone if the rest fails
            self.state.ulysses = ulysses_of(transformer)
            if self.state.ulysses is not None:
                self._check_heads(self.state.ulysses.degree)
                undo.callback(put_aside(transformer))
            watched = self.denoising.watch(transformer, self.one_thread.enter, self._end_run)
            undo.callback(watched)
            for module in family.self_attentions(transformer):
                undo.callback(self._install_processor(module))
            self.state.layers = len(self.layers)
            undo.callback(keep_through_fusion(transformer, self.swaps))
            for undo_hook in family.hooks(transformer, self):
                undo.callback(undo_hook)
            hook = transformer.register_forward_pre_hook(self._before_call, with_kwargs=True)
            undo.callback(hook.remove)
            hook = transformer.register_forward_hook(self._after_call)
            undo.callback(hook.remove)
            self._off = undo.pop_all()

    def off(self) -> None:
        self._off.close()
        self.state.drop()

    def _check_parallelism(self, config: Any) -> None:
        if is_compiled(self.transformer):
            raise RuntimeError("the transformer is compiled: call enable_parallelism before that")
        refuse_other_parallelism(config)
        self._check_heads(degree_of(config))

    def _check_heads(self, degree: int) -> None:
        if not self.family.splits:
            raise RuntimeError(
                f"{self.family.name} does not run sparse on several GPUs: its layers slice the"
                " tokens by frame; run one pipeline per GPU"
            )
        if self.config.compares_heads:
            raise ValueError(
                f"{self.handle.method} compares the heads of a layer, which several GPUs share:"
                " choose another method, or run one pipeline per GPU"
            )
        refuse_heads(self.family.self_attentions(self.transformer), degree)

    def _install_processor(self, module: Any) -> Undo:
        name = type(module.processor).__name__
        if name not in (self.family.stock_processor, self.family.fused_processor):
            self.handle.note(f"{name} is put aside until sparse attention is disabled")
        layer = LayerAttention(self.state, self.config, len(self.layers), self.measure)
        swap = Swap(module, self.family.processor(register_layer(layer)))
        layer.dense = swap.ours.dense
        self.layers.append(layer)
        self.swaps.append(swap)
        return swap.take_off

    @torch.compiler.disable  # where the whole transformer is compiled, not its blocks alone
    @torch_defaults()
    def _before_call(
        self, transformer: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        self.one_thread.enter()
        if self._inside:
            self.denoising.reset()
            self.state.drop()
        refuse_faster_cache(transformer)
        given = dict(zip(self.argument_names, args)) | kwargs
        latents = given["hidden_states"]
        step, num_steps, branch = self.denoising.read(given["timestep"])
        self._inside = self.denoising.in_own_loop
        prepared = self.family.prepare(transformer, given, self.handle.keep_padding)
        batch, lengths = len(latents), prepared.lengths
        guided = self._guided(branch, step, batch) and lengths is None
        place = latents.device, latents.dtype
        call = Call(prepared.grid, step, num_steps, branch, *place, lengths, guided, batch)
        before = self.state.last.get(branch)
        if self.state.begin(call):
            self.handle.forget_other_runs(step)
            if before is not None and before.step < step:
                self.handle.note(CHANGED.format(step), self.state)
        self._tell_of_forced_blocks(prepared.grid)
        if len(self.state.last) > 1:
            refuse_shared_broadcast(swap.module for swap in self.swaps)
        replaced = sum(not swap.is_on for swap in self.swaps)
        if replaced:
            self.state.parts_outside += replaced * self.state.parts
            self.handle.note(
                f"{replaced} of our attention processors were replaced after enabling and run"
                " without sparsity; enable sparse attention last",
                self.state,
            )
        changed = prepared.changed | self._reordered(given, prepared)
        return ((), given | changed) if changed else None

    @torch.compiler.disable
    def _after_call(self, *_: Any) -> None:
        """Of a bare transformer nobody else says that a run has ended.

        Where its last step makes two calls, it seems over between them.
        """
        self._inside, call = False, self.state.call
        if self.one_thread.knows_loop:
            return
        if call is not None and call.step == call.num_steps - 1:
            self.one_thread.end()

    def _guided(self, branch: str, step: int, batch: int) -> bool:
        """Whether a batch holds both guidance branches; judged at the first step of a run that has
        such a batch, since CogVideoX may change its scale later."""
        before = self.state.last.get(branch)
        if before is not None and before.step < step and before.batch == batch:
            return before.guided
        pipe = self.handle.enabled_on()
        scale = getattr(pipe, "guidance_scale", None)
        return branch == "cond_uncond" and batch % 2 == 0 and scale is not None and scale > 1

    def _end_run(self) -> None:
        self.state.drop()
        self.one_thread.end()

    def _tell_of_forced_blocks(self, grid: VideoGrid) -> None:
        """They count towards the density; where they alone are more, it cannot be kept."""
        share = grid.forced_share(self.config.block_size)
        if share > self.config.density:
            self.handle.note(
                f"text and conditioning frames are {share:.0%} of the blocks and always attended:"
                f" density={self.config.density:g} leaves the rest with its own block alone",
                self.state,
            )

    def _reordered(self, given: dict, prepared: Prepared) -> dict:
        """Inputs that are put in block order: per-token tables, and maybe the latent video."""
        latents, order = given["hidden_states"], self.order(given["hidden_states"])
        if order is None:
            return {}
        names = [name for name in prepared.per_token if given.get(name) is not None]
        changed: dict = {name: tuple(x[order] for x in given[name]) for name in names}
        if prepared.latent_patch is not None and not self.split:
            patch = prepared.latent_patch
            changed["hidden_states"] = order_patches(latents, prepared.grid, patch, order)
        return changed

    @property
    def grid(self) -> VideoGrid:
        assert self.state.call is not None
        return self.state.call.grid

    @property
    def split(self) -> bool:
        return self.state.ulysses is not None

    @torch.compiler.disable
    def order(self, like: Tensor) -> Tensor | None:
        orders, ulysses = self._orders(like), self.state.ulysses
        if ulysses is None:
            return None if orders is None else orders[0]
        part = ulysses.part(self.grid.video_tokens)
        if orders is None:
            return torch.arange(part.start, part.stop, device=like.device)
        return orders[0][part]

    @torch.compiler.disable
    def restored(self, x: Tensor) -> Tensor:
        orders, ulysses = self._orders(x), self.state.ulysses
        if ulysses is not None:
            x = ulysses.all_tokens(x, self.grid.video_tokens)
        return x if orders is None else x[:, orders[1]]

    def first_of(self, tokens: int) -> int:
        if self.state.ulysses is None:
            return tokens
        part = self.state.ulysses.part(self.grid.video_tokens)
        return min(max(tokens - part.start, 0), part.stop - part.start)

    def _orders(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Block order of the current call and its inverse on a device, None for raster order."""
        if self.config.density == 1 or self.config.order == "raster":
            return None
        return _orders_on(like.device, self.grid, self.config.order, self.config.block_size)

    def order_in_layers(self) -> None:
        for layer in self.layers:
            layer.orders = self._orders

    def remove(self) -> None:
        self._undo.close()


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept for calls that autograd follows, too
def _orders_on(
    device: torch.device, grid: VideoGrid, order: str, block_size: int
) -> tuple[Tensor, Tensor]:
    permutation, inverse = token_order(grid, order, block_size)
    return permutation.to(device), inverse.to(device)


def make_config(method: str | SparseConfig, options: dict) -> tuple[SparseConfig, str]:
    """The config that a method and its options give, and the method's name."""
    if isinstance(method, SparseConfig):
        cls, given = type(method), method.to_dict()
        name = next((name for name, other in METHODS.items() if other is cls), cls.__name__)
    elif str(method).endswith(SUFFIX):
        preset = read_preset(str(method))
        cls, name, given = METHODS[preset.method], preset.method, preset.options
    elif (known := method_class(str(method))) is not None:
        cls, name, given = known, str(method), {}
    else:
        raise ValueError(f"unknown method {method!r}{_nearest(method, list(METHODS))}")
    options = _at_target(cls, options)
    for option in options:
        if option not in cls.options():
            raise TypeError(f"{name} has no option {option!r}{_nearest(option, cls.options())}")
    return cls(**{**given, **options}), name


def _at_target(cls: type[SparseConfig], options: dict) -> dict:
    """The options that a target stands for, then those given."""
    if "target" not in options or not cls.targets:
        return options
    target = options["target"]
    if target not in cls.targets:
        raise ValueError(f"target must be one of {', '.join(cls.targets)}, got {target!r}")
    return cls.targets[target] | {k: v for k, v in options.items() if k != "target"}


def _nearest(word: Any, choices: list[str]) -> str:
    close = difflib.get_close_matches(str(word), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (there are {', '.join(choices)})"


def _modules(pipe: Any) -> list[nn.Module]:
    parts = [pipe] if isinstance(pipe, nn.Module) else getattr(pipe, "components", {}).values()
    return [part for part in parts if isinstance(part, nn.Module)]


def supported_transformers(pipe: Any) -> list[tuple[nn.Module, Family]]:
    """The supported transformers in a pipeline, each once, or the one given; a compiled one
    unwrapped."""
    modules = [getattr(module, "_orig_mod", module) for module in _modules(pipe)]
    found = [(part, family) for part in dict.fromkeys(modules) if (family := family_of(part))]
    if not found:
        supported = ", ".join(name for family in families() for name in family.pipelines)
        names = ", ".join(type(module).__name__ for module in modules if module is not pipe)
        here = f" among {names}" if names else ""
        here += "".join(f" ({why})" for module in modules if (why := refusal_of(module)))
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has no transformer that can run sparse{here}; supported are"
            f" {supported} and their transformers"
        )
    return found


def _handles(pipe: Any) -> list[SparseAttention]:
    """Handles that are enabled on any transformer of a pipeline."""
    found = [vars(transformer).get(_HANDLE) for transformer, _ in supported_transformers(pipe)]
    return list(dict.fromkeys(handle for handle in found if handle is not None))


def _refuse_compiled(pipe: Any) -> None:
    for module in _modules(pipe):
        transformer = getattr(module, "_orig_mod", module)
        compiled = transformer is not module or is_compiled(module)
        if compiled and family_of(transformer) is not None:
            raise RuntimeError(
                "the transformer is already compiled: enable first, compile second (load the"
                " pipeline again, call enable_sparse_attention, then compile)"
            )


def is_compiled(module: nn.Module) -> bool:
    """The module or a part of it."""
    return any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        for part in module.modules()
    )
