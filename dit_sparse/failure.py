"""Failures on the command line: one clear sentence on stderr and an exit code, no traceback."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
# These are raised on purpose with a sentence for the user; any other type is named beside its text.
OWN_SENTENCES = (ValueError, TypeError, NotImplementedError, RuntimeError, OSError, MemoryError)
FULL_DISK = os.strerror(errno.ENOSPC)


@contextmanager
def told(code: int, debug: bool, kept: Callable[[], str] = str) -> Iterator[None]:
    """Turn an exception of the block into a sentence and `code`; `kept` tells what was finished."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        stop(f"Interrupted. {kept()}", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        stop(f"Error: {sentence(error)} {kept()}", code)


@contextmanager
def output_told() -> Iterator[None]:
    """Turn an output that cannot be written, as on a full disk, into a sentence and a code."""
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # or Python does so at its end, when nothing can be told
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is left
        ended = error.__context__
        if not isinstance(ended, SystemExit) or not ended.code:  # else a sentence is there
            print(f"Error: the output is cut off: {error}.", file=sys.stderr)
        sys.exit(FAILURE)


def stop(text: str, code: int) -> NoReturn:
    print(text.strip(), file=sys.stderr)
    raise typer.Exit(code)


def sentence(error: Exception) -> str:
    """What to tell a user about `error`, on one line."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return (
            "out of memory. Use fewer --frames, a smaller --height and --width (of bench fewer "
            "--tokens or --heads), --dtype bfloat16, or a GPU with more memory."
        )
    if FULL_DISK in text:  # from Python or from a library of another language
        return f"the disk is full ({text}). Free some space, or name another --out."
    if not isinstance(error, OWN_SENTENCES) or not text:
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text if text.endswith((".", ")", "?")) else f"{text}."


def is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    if type(error) is MemoryError and text:  # a limit of ours, with its own sentence
        return False
    # By name: this file must not import torch, and the class moved between its releases.
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or "can't allocate memory" in text
