"""`enable_sparse_attention` and its undo."""

import difflib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from .config import SparseConfig
from .denoising import Denoising
from .grid import token_order
from .patterns import AUTO, METHODS
from .pipelines.family import Family, families, family_of
from .report import Report, make_report
from .state import Call, State
from .step import LayerAttention, register_layer

logger = logging.getLogger(__name__)

_HANDLE = "_dit_sparse_handle"  # attribute of a transformer that runs sparse


class UnsupportedPipelineError(TypeError):
    """The object is no pipeline or transformer whose self-attention we know."""


def enable_sparse_attention(
    pipe: Any,
    method: str | SparseConfig = "auto",
    *,
    measure: bool = False,
    num_steps: int | None = None,
    **options: Any,
) -> "SparseAttention":
    """Make the self-attention of a pipeline's transformers sparse, in place.

    Enabling again replaces the method. Call it before `torch.compile`. Inference only.

    Args:
        pipe: a diffusers pipeline (`supported_pipelines()`), or one of its transformers.
        method: a name out of `available_methods()`, or a config such as `AdaSpa(density=0.3)`.
        measure: also measure the kept softmax mass at every sparse step (a few percent slower).
        num_steps: denoising steps in all; only needed for a bare transformer.
        options: fields of the method's config, such as `density=0.3`.

    Returns:
        A handle with `report()` and `disable()`; as a context manager it disables at the end.

    Raises:
        UnsupportedPipelineError: nothing in `pipe` is supported.
        ValueError: an unknown method, or an option with a value that is not allowed.
        TypeError: an option that the method does not have.
        RuntimeError: the transformer is compiled, or sharded over several GPUs.
    """
    config, name = _config(method, options)
    transformers = _transformers(pipe)
    for transformer, _ in transformers:
        _refuse_compiled(transformer)
        _refuse_sharded(transformer)
    disable_sparse_attention(pipe)
    owner = None if isinstance(pipe, nn.Module) else pipe
    return SparseAttention(transformers, owner, name, config, measure, num_steps)


def disable_sparse_attention(pipe: Any) -> None:
    """Undo `enable_sparse_attention`; does nothing where it is not enabled."""
    for transformer, _ in _transformers(pipe):
        handle = vars(transformer).get(_HANDLE)
        if handle is not None:
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
    ):
        self.method, self.config = method, config
        self._notes: list[str] = []
        if method == "auto":
            self._notes.append(f'method="auto" is {AUTO} in {config.order} order')
        self._installed = [
            Installation(transformer, family, pipe, config, measure, num_steps, self._note)
            for transformer, family in transformers
        ]
        for transformer, _ in transformers:
            setattr(transformer, _HANDLE, self)

    @property
    def enabled(self) -> bool:
        return bool(self._installed) and self._installed[0].active

    def report(self) -> Report:
        """Figures of the last generation; kept after `disable`."""
        return make_report(
            self.method,
            self.config.to_dict(),
            [installed.state for installed in self._installed],
            [len(installed.processors) for installed in self._installed],
            self._notes,
        )

    def disable(self) -> None:
        """Leave the pipeline as it was; does nothing the second time."""
        for installed in self._installed:
            installed.remove()
            if vars(installed.transformer).get(_HANDLE) is self:
                delattr(installed.transformer, _HANDLE)

    def __enter__(self) -> "SparseAttention":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            logger.warning(text)


class Installation:
    """Processors and hooks on one transformer, and how to take them off again."""

    def __init__(self, transformer, family, pipe, config, measure, num_steps, note):
        self.transformer, self.family, self.config, self.note = transformer, family, config, note
        self.state = State()
        self.active = True
        self.denoising = Denoising(transformer, pipe, num_steps, on_end=self.state.drop)
        self.layers: list[LayerAttention] = []  # the operator finds them by weak references
        self.processors: list[tuple[nn.Module, Any, Any]] = []  # module, ours, the one before
        for index, module in enumerate(family.self_attentions(transformer)):
            before = module.processor
            ours = self._processor(index, before, measure)
            module.set_processor(ours)
            self.processors.append((module, ours, before))
        self.undo = family.reorder_tokens(transformer, self._permutation)
        hook = transformer.register_forward_pre_hook(self._before_call, with_kwargs=True)
        self.undo.append(hook.remove)

    def _processor(self, index: int, before: Any, measure: bool) -> Any:
        layer = LayerAttention(self.state, self.config, index, measure)
        ours = self.family.processor(register_layer(layer))
        ours._attention_backend = before._attention_backend
        layer.dense = ours.dense
        self.layers.append(layer)
        return ours

    def _before_call(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = kwargs.get("hidden_states", args[0] if args else None)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        step, num_steps, branch = self.denoising.read(timestep)
        self.state.begin(
            Call(
                self.family.grid(transformer, hidden_states),
                step,
                num_steps,
                branch,
                hidden_states.device,
                hidden_states.dtype,
            )
        )
        replaced = sum(module.processor is not ours for module, ours, _ in self.processors)
        if replaced:
            self.note(
                f"{replaced} of our attention processors were replaced after enabling and run"
                " without sparsity; enable sparse attention last"
            )

    def _permutation(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Block order of the current call and its inverse on a device, None for raster order."""
        if self.config.density == 1 or self.config.order == "raster":
            return None
        assert self.state.call is not None
        order = token_order(self.state.call.grid, self.config.order, self.config.block_size)
        return _on_device(order, like.device)

    def remove(self) -> None:
        if not self.active:
            return
        self.active = False
        for undo in self.undo:
            undo()
        self.denoising.remove()
        for module, ours, before in self.processors:
            if module.processor is ours:
                before._attention_backend = ours._attention_backend
                module.set_processor(before)
        self.state.drop()


_ON_DEVICE: dict[tuple, tuple[Tensor, Tensor]] = {}


def _on_device(order: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "cpu":
        return order
    key = id(order), device
    if key not in _ON_DEVICE:
        if len(_ON_DEVICE) >= 16:
            _ON_DEVICE.clear()
        _ON_DEVICE[key] = order[0].to(device), order[1].to(device)
    return _ON_DEVICE[key]


def _config(method: str | SparseConfig, options: dict) -> tuple[SparseConfig, str]:
    if isinstance(method, SparseConfig):
        name = next(n for n, cls in METHODS.items() if cls is type(method))
        values = {**method.to_dict(), **options}
    elif method == "auto" or method in METHODS:
        name, values = method, options
    else:
        raise ValueError(f"unknown method {method!r}{_nearest(method, ['auto', *METHODS])}")
    cls = METHODS[AUTO if name == "auto" else name]
    for option in options:
        if option not in cls.options():
            raise TypeError(f"{name} has no option {option!r}{_nearest(option, cls.options())}")
    return cls(**values), name


def _nearest(word: Any, choices: list[str]) -> str:
    close = difflib.get_close_matches(str(word), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (there are {', '.join(choices)})"


def _transformers(pipe: Any) -> list[tuple[nn.Module, Family]]:
    """The supported transformers in a pipeline, or the one given."""
    if isinstance(pipe, nn.Module):
        candidates = [pipe]
    else:
        components = getattr(pipe, "components", None)
        candidates = [c for c in components.values() if isinstance(c, nn.Module)] if components else []
    found = []
    for candidate in candidates:
        candidate = getattr(candidate, "_orig_mod", candidate)
        family = family_of(candidate)
        if family is not None:
            found.append((candidate, family))
    if not found:
        supported = ", ".join(name for family in families() for name in family.pipelines)
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has no transformer that can run sparse; supported are"
            f" {supported} and their transformers"
        )
    return found


def _refuse_compiled(transformer: nn.Module) -> None:
    blocks = transformer.modules()
    if any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks):
        raise RuntimeError(
            "the transformer is already compiled: enable first, compile second (load the pipeline"
            " again, call enable_sparse_attention, then compile)"
        )


def _refuse_sharded(transformer: nn.Module) -> None:
    if getattr(transformer, "_parallel_config", None) is not None:
        raise RuntimeError(
            "the transformer is sharded by enable_parallelism, which sparse attention does not"
            " support yet: run one pipeline per GPU, or disable one of the two"
        )
