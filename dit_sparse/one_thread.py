"""One run at a time on a transformer: what is kept between steps belongs to one denoising loop."""

import inspect
import sys
import threading
from types import CodeType
from typing import Any

MESSAGE = (
    "two threads call one transformer at the same time: masks, and the scheduler of a pipeline,"
    " belong to one run. Both runs are refused; take turns, or give each thread a pipeline of its"
    " own"
)


class OneThread:
    """Refuses the calls of a second thread while a run of a first one is in progress, and then the
    first one too: the second has already moved the scheduler that they share."""

    def __init__(self, pipe: Any):
        call = inspect.unwrap(type(pipe).__call__)
        # Of a bare transformer the loop is not known.
        is_pipeline = hasattr(pipe, "components")
        self._loop: CodeType | None = getattr(call, "__code__", None) if is_pipeline else None
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._disturbed: set[int] = set()

    @property
    def knows_loop(self) -> bool:
        return self._loop is not None

    def enter(self) -> None:
        """A call begins in this thread."""
        me = threading.get_ident()
        with self._lock:
            if self._owner not in (None, me) and self._in_progress(self._owner):
                self._disturbed.add(self._owner)
                self._owner = None
                raise RuntimeError(MESSAGE)
            self._refuse_disturbed(me)
            self._owner = me

    def end(self) -> None:
        """A run of this thread has ended."""
        me = threading.get_ident()
        with self._lock:
            if self._owner == me:
                self._owner = None
            self._refuse_disturbed(me)

    def _refuse_disturbed(self, me: int) -> None:
        if me in self._disturbed:
            self._disturbed.discard(me)
            raise RuntimeError(MESSAGE)

    def _in_progress(self, thread: int | None) -> bool:
        """Whether a thread is still in the pipeline's loop: an error may have ended its run. Where
        the loop is not known, whether the thread lives: `end` is called after the last step."""
        frame = sys._current_frames().get(thread) if thread is not None else None
        if self._loop is None:
            return frame is not None
        while frame is not None and frame.f_code is not self._loop:
            frame = frame.f_back
        return frame is not None
