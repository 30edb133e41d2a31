"""Run a Gluon kernel with torch on the CPU, which Triton's interpreter cannot.

The kernel's own Python code runs, with another `gl` and other barriers, copies and products. They
are as late, or as early, as those of a GPU may be, so that a missing wait shows:

- a copy poisons its buffer at once, and its data come when a barrier is waited for;
- a product is computed when it is waited for, and its operands must still be what they were;
- a wait that nothing would end raises, and so does a copy that nobody waits for.

What it cannot see: layouts, registers, races between warps, the times of anything.
"""

import itertools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction


class Values(Tensor):
    """What a kernel computes with."""

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)


def values(x: Any, dtype: torch.dtype | None = None) -> Values:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Values)


class Pointer:
    """An address in a tensor, or many."""

    def __init__(self, storage: Tensor, offset: Any = 0):
        self.storage, self.offset = storage, values(offset)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.storage, self.offset + other)


class Barrier:
    """Flips when the one copy that it expects has arrived."""

    def __init__(self):
        self.phases, self.expected, self.arriving = 0, 0, deque()


class Product:
    """A product of the tensor cores that nobody has waited for yet."""

    def __init__(self, a: Tensor, b: Tensor, acc: Tensor | None):
        self.a, self.b, self.acc = a, b, acc
        self.before = a.clone(), b.clone()

    def result(self) -> Values:
        for now, before in zip((self.a, self.b), self.before):
            same = torch.equal(now.nan_to_num(), before.nan_to_num())
            assert same, "an operand was overwritten before its product ended"
        product = self.a.float() @ self.b.float()
        return values(product if self.acc is None else product + self.acc)


class Buffers(list):
    """Shared memory by its first axis."""

    def __init__(self, items: list, shape: list[int]):
        super().__init__(items)
        self.shape = shape

    def index(self, i: Any) -> Any:
        return self[int(i)]


class Tiles:
    """A tensor descriptor."""

    def __init__(self, of: Any):
        self.of, self.dtype, self.layout = of, of.base.dtype, None
        size = of.base.element_size() * torch.Size(of.block_shape).numel()
        self.block_type = types.SimpleNamespace(nbytes=size)
        self.whole = of.base.as_strided(of.shape, of.strides)

    def read(self, start: list) -> Tensor:
        tile = torch.zeros(self.of.block_shape, dtype=self.dtype)
        begins = [int(s) for s in start]
        sizes = [
            max(min(n, b), 0)
            for n, b in zip(
                [total - begin for total, begin in zip(self.of.shape, begins)], self.of.block_shape
            )
        ]
        part = self.whole[tuple(slice(b, b + s) for b, s in zip(begins, sizes))]
        tile[tuple(slice(0, s) for s in sizes)] = part
        return tile


class Language:
    """`gl` of one program. Layouts are nothing here."""

    float32, int32, int64, constexpr = torch.float32, torch.int32, torch.int64, None

    def __init__(self, program: tuple[int, ...]):
        self.program, self.barriers = program, []

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_, **__: None
        raise AttributeError(f"gl.{name} is not known here")

    def program_id(self, axis: int) -> Values:
        return values(self.program[axis] if axis < len(self.program) else 0)

    def static_range(self, *args: int) -> range:
        return range(*args)

    def full(self, shape: list[int], value: float, dtype: torch.dtype, _: Any) -> Values:
        return values(torch.full(shape, value, dtype=dtype))

    def arange(self, start: int, end: int, _: Any) -> Values:
        return values(torch.arange(start, end))

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0) -> Values:
        offset = pointer.offset
        mask = values(True if mask is None else mask).expand(offset.shape)
        found = torch.full(offset.shape, other, dtype=pointer.storage.dtype)
        found[mask] = pointer.storage[offset[mask].long()]
        return values(found)

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        shape = torch.broadcast_shapes(pointer.offset.shape, value.shape)
        offset, value, mask = (x.expand(shape) for x in (pointer.offset, value, mask))
        pointer.storage[offset[mask].long()] = value[mask].to(pointer.storage.dtype)

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], _: Any) -> Buffers:
        if dtype == torch.int64:
            barriers = [Barrier() for _ in range(shape[0])]
            self.barriers += barriers
            return Buffers(barriers, shape)
        return Buffers(list(torch.full(shape, torch.nan, dtype=dtype)), shape)

    def where(self, condition: Any, a: Any, b: Any) -> Values:
        return torch.where(values(condition), values(a), values(b))

    def maximum(self, a: Any, b: Any) -> Values:
        return torch.maximum(values(a), values(b))

    def minimum(self, a: Any, b: Any) -> Values:
        return torch.minimum(values(a), values(b))

    def fma(self, a: Any, b: Any, c: Any) -> Values:
        return a * b + c

    def max(self, x: Tensor, axis: int) -> Values:
        return x.amax(axis)

    def sum(self, x: Tensor, axis: int) -> Values:
        return x.sum(axis)

    def exp2(self, x: Tensor) -> Values:
        return torch.exp2(x)

    def log2(self, x: Tensor) -> Values:
        return torch.log2(x)

    def convert_layout(self, x: Tensor, _: Any) -> Tensor:
        return x


class Barriers:
    """`mbarrier`."""

    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        assert count == 1

    @staticmethod
    def expect(barrier: Barrier, _: int, pred: Any = True) -> None:
        if pred:
            assert barrier.expected == barrier.phases, "a second copy, and nobody took the first"
            barrier.expected += 1

    @staticmethod
    def wait(barrier: Barrier, phase: Any) -> None:
        if barrier.phases % 2 == phase:
            assert barrier.arriving, "waits for ever"
            buffer, tile = barrier.arriving.popleft()
            buffer.copy_(tile)
            barrier.phases += 1
            assert barrier.phases == barrier.expected


def copy_tile(
    tensor: Tiles, start: list, barrier: Barrier, buffer: Tensor, pred: Any = True
) -> None:
    if pred:
        buffer.fill_(torch.nan)
        barrier.arriving.append((buffer, tensor.read(start)))


class ProductsInFlight:
    def __init__(self):
        self.started: list[Product] = []

    def start(
        self, a: Tensor, b: Tensor, acc: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        product = Product(a, b, acc if use_acc else None)
        self.started.append(product)
        return product

    def wait(self, left: int, deps: tuple[Product, ...]) -> Values:
        (product,) = deps
        assert product not in self.started[len(self.started) - left :], "not waited for"
        self.started = self.started[len(self.started) - left :]
        return product.result()


class Emulated:
    """What may stand for `module.name` and runs its programs in turn."""

    def __init__(self, module: types.ModuleType, name: str):
        self.name, self.known = name, dict(vars(module))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def run(**arguments: Any) -> None:
            given = {key: argument(value) for key, value in arguments.items()}
            for program in itertools.product(*(range(size) for size in grid)):
                language = Language(program)
                self.kernel(language)(**given)
                waited = not any(barrier.arriving for barrier in language.barriers)
                assert waited, "ends before a copy has come"

        return run

    def kernel(self, language: Language) -> Callable:
        """The Python function, with what it calls."""
        products = ProductsInFlight()
        known = self.known | {
            "gl": language,
            "mbarrier": Barriers,
            "copy_tile": copy_tile,
            "fence_async_shared": lambda: None,
            "warpgroup_mma": products.start,
            "warpgroup_mma_wait": products.wait,
        }
        for key, value in self.known.items():
            if isinstance(value, JITFunction):
                function = value.fn
                known[key] = types.FunctionType(function.__code__, known, key)
        return known[self.name]


def argument(value: Any) -> Any:
    if hasattr(value, "block_shape"):
        return Tiles(value)
    if isinstance(value, Tensor):
        size = value.untyped_storage().nbytes() // value.element_size()
        return Pointer(value.as_strided((size,), (1,), 0), value.storage_offset())
    return value
