"""Run a Gluon kernel with torch on the CPU, which Triton's interpreter cannot.

The kernel's own Python code runs, with another `gl` and other barriers, copies and products. They
are as late, or as early, as those of a GPU may be, so that a missing wait shows:

- a copy poisons its buffer at once, and its data come when a barrier is waited for;
- a product is computed when it is waited for, and its operands must still be what they were;
- a wait that nothing would end raises, and so does a copy that nobody waits for.

What it cannot see: layouts, registers, races between warps, the times of anything.
"""

import inspect
import itertools
import random
import threading
import types
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

PATIENCE = 2000  # turns that a warp group waits before it is thought to wait for ever


class Values(Tensor):
    """What a kernel computes with."""

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def __iadd__(self, other: Any) -> "Values":
        return self + other  # names are bound anew, nothing changes in place

    def __imul__(self, other: Any) -> "Values":
        return self * other

    def store(self, x: Tensor) -> None:
        self.copy_(x)

    def load(self, _: Any) -> "Values":
        return self.clone()


def values(x: Any, dtype: torch.dtype | None = None) -> Values:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Values)


class Pointer:
    """An address in a tensor, or many."""

    def __init__(self, storage: Tensor, offset: Any = 0):
        self.storage, self.offset = storage, values(offset)
        self.dtype = types.SimpleNamespace(element_ty=storage.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.storage, self.offset + other)


class Barrier:
    """Flips when all have arrived, and the copies that it expects."""

    def __init__(self):
        self.phases, self.arrived, self.count, self.copies = 0, 0, 0, deque()

    def arrive(self, count: int = 1) -> None:
        self.arrived += count
        assert self.arrived <= self.count, "a second arrival, and nobody took the first"
        self.flip()

    def flip(self) -> None:
        if self.arrived == self.count and not self.copies:
            self.phases, self.arrived = self.phases + 1, 0


class Tasks:
    """Warp groups that run in turns: who waits, or arrives, lets another go on, drawn by lot."""

    def __init__(self, functions: list[Callable[[], None]], seed: int):
        self.random, self.error, self.steps = random.Random(seed), None, 0
        self.left = [threading.Thread(target=self.run, args=(f,)) for f in functions]
        self.go = {thread: threading.Semaphore(0) for thread in self.left}
        self.back = threading.Semaphore(0)

    def run(self, function: Callable[[], None]) -> None:
        self.go[threading.current_thread()].acquire()
        try:
            function()
        except BaseException as error:
            self.error = self.error or error
        self.left.remove(threading.current_thread())
        self.back.release()

    def pause(self) -> None:
        self.back.release()
        self.go[threading.current_thread()].acquire()
        if self.error:
            raise SystemExit

    def finish(self) -> None:
        for thread in self.left:
            thread.start()
        while self.left:
            self.go[self.random.choice(self.left)].release()
            self.back.acquire()
        if self.error:
            raise self.error


class Product:
    """A product of the tensor cores that nobody has waited for yet."""

    def __init__(self, a: Tensor, b: Tensor, acc: Tensor | None):
        self.a, self.b, self.acc = a, b, acc
        self.before = a.float().clone(), b.float().clone()

    def result(self) -> Values:
        for now, before in zip((self.a, self.b), self.before):
            same = torch.equal(now.float().nan_to_num(), before.nan_to_num())
            assert same, "an operand was overwritten before its product ended"
        product = self.a.float() @ self.b.float()
        return values(product if self.acc is None else product + self.acc)


class Buffers(list):
    """Shared memory by its first axis."""

    def __init__(self, items: list, shape: list[int], dtype: torch.dtype):
        super().__init__(items)
        self.shape, self.dtype = shape, dtype

    def index(self, i: Any) -> Any:
        return self[int(i)]


class Tiles:
    """A tensor descriptor."""

    def __init__(self, of: Any):
        self.of, self.dtype, self.layout = of, of.base.dtype, None
        size = of.base.element_size() * torch.Size(of.block_shape).numel()
        self.block_type = types.SimpleNamespace(nbytes=size, shape=of.block_shape)
        self.whole = of.base.as_strided(of.shape, of.strides)

    def inside(self, start: list) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tensor under a tile, and where in the tile it lies."""
        begins = [int(begin) for begin in start]
        ends = [min(b + n, size) for b, n, size in zip(begins, self.of.block_shape, self.of.shape)]
        sizes = [max(end - begin, 0) for begin, end in zip(begins, ends)]
        part = self.whole[tuple(slice(b, b + n) for b, n in zip(begins, sizes))]
        return part, tuple(slice(n) for n in sizes)

    def read(self, start: list) -> Tensor:
        tile = torch.zeros(self.of.block_shape, dtype=self.dtype)
        part, place = self.inside(start)
        tile[place] = part
        return tile

    def write(self, start: list, tile: Tensor) -> None:
        part, place = self.inside(start)
        part.copy_(tile[place])


class Language:
    """`gl` of one program. Layouts are nothing here."""

    float32, int32, int64 = torch.float32, torch.int32, torch.int64
    float8e4nv = torch.float8_e4m3fn

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...]):
        self.program, self.grid, self.barriers = program, grid, []
        self.tasks: Tasks | None = None

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_, **__: None
        raise AttributeError(f"gl.{name} is not known here")

    def program_id(self, axis: int) -> Values:
        return values(self.program[axis] if axis < len(self.program) else 0)

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    def warp_specialize(self, tasks: list[tuple], warps: list[int], registers: list[int]) -> None:
        calls = [partial(function, *arguments) for function, arguments in tasks]
        self.tasks = Tasks(calls, seed=sum(self.program))
        self.tasks.finish()
        self.tasks = None

    def pause(self) -> None:
        if self.tasks is not None:
            self.tasks.pause()

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> Values:
        before = self.load(pointer).clone()
        pointer.storage[int(pointer.offset)] += value
        return before

    def to_tensor(self, x: int) -> Values:
        return values(x)

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
        assert (offset[mask] >= 0).all(), "reads before the begin of a tensor"
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
            return Buffers(barriers, shape, dtype)
        filled = torch.full(shape, torch.nan if dtype.is_floating_point else -99, dtype=dtype)
        return Buffers(list(values(filled)), shape, dtype)

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

    def convert_layout(self, x: Tensor, _: Any, assert_trivial: bool = False) -> Tensor:
        return x


class Barriers:
    """`mbarrier`."""

    MBarrierLayout = staticmethod(lambda: None)

    def __init__(self, language: Language):
        self.language = language

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = count

    def expect(self, barrier: Barrier, _: int, pred: Any = True) -> None:
        if pred:
            barrier.arrived += 1  # flips no sooner than the copy comes
            assert barrier.arrived <= barrier.count, "a second copy, and nobody took the first"

    def arrive(self, barrier: Barrier, count: int, pred: Any = True) -> None:
        if pred:
            barrier.arrive(count)
            self.language.pause()

    def wait(self, barrier: Barrier, phase: Any) -> None:
        self.language.pause()
        for _ in range(PATIENCE):
            while barrier.copies and barrier.phases % 2 == phase:
                buffer, tile = barrier.copies.popleft()
                buffer.copy_(tile)
                barrier.flip()
            if barrier.phases % 2 != phase:
                return
            if self.language.tasks is None:
                break
            self.language.pause()
        raise AssertionError("waits for ever")


def copy_tile(
    tensor: Tiles, start: list, barrier: Barrier, buffer: Tensor, pred: Any = True
) -> None:
    if pred:
        buffer.fill_(torch.nan)
        barrier.copies.append((buffer, tensor.read(start)))


class Stores:
    """Copies from buffers; they read them when they are waited for."""

    def __init__(self):
        self.started: list[tuple] = []

    def start(self, tensor: Tiles, start: list, buffer: Tensor) -> None:
        self.started.append((threading.get_ident(), tensor, start, buffer, buffer.clone()))

    def store_wait(self, left: int) -> None:
        mine = [store for store in self.started if store[0] == threading.get_ident()]
        for store in mine[: len(mine) - left]:
            _, tensor, start, buffer, before = store
            assert torch.equal(buffer, before), "a buffer was overwritten before it was stored"
            tensor.write(start, buffer)
            self.started.remove(store)


class ProductsInFlight:
    """Of each warp group its own, in the order of their start."""

    def __init__(self):
        self.started: dict[int, list[Product]] = defaultdict(list)

    def start(
        self, a: Tensor, b: Tensor, acc: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        product = Product(a, b, acc if use_acc else None)
        self.started[threading.get_ident()].append(product)
        return product

    def wait(self, left: int, deps: tuple[Product, ...]) -> Values:
        (product,), mine = deps, self.started[threading.get_ident()]
        del mine[: len(mine) - left]
        assert product not in mine, "not waited for"
        return product.result()


class Emulated:
    """What may stand for `module.name` and runs its programs in turn."""

    def __init__(self, module: types.ModuleType, name: str):
        self.name, self.known = name, dict(vars(module))
        self.parameters = inspect.signature(self.known[name].fn).parameters

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def run(**arguments: Any) -> None:
            given = {key: argument(value) for key, value in arguments.items()}
            for compiled in {"num_warps", "maxnreg"} - set(self.parameters):
                given.pop(compiled, None)
            for program in itertools.product(*(range(size) for size in grid)):
                language, stores = Language(program, grid), Stores()
                self.kernel(language, stores)(**given)
                waiting = [copy for barrier in language.barriers for copy in barrier.copies]
                assert not waiting + stores.started, "ends before a copy is done"

        return run

    def kernel(self, language: Language, stores: Stores) -> Callable:
        """The Python function, with what it calls."""
        products = ProductsInFlight()
        known = self.known | {
            "gl": language,
            "mbarrier": Barriers(language),
            "copy_tile": copy_tile,
            "store_tile": stores.start,
            "tma": stores,
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
