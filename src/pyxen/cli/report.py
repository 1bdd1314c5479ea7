# SPDX-License-Identifier: GPL-2.0-only
"""The frame around every command: an error is one line and a hint on standard error, never a traceback."""

from __future__ import annotations

import os
import sys

from pyxen.errors import PyxenError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as a shell has it."""


class Failure(PyxenError):
    """A command failed and ``message`` is all there is to say (without the program's name before it)."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def complain(error: PyxenError) -> int:
    """Print ``error``; the exit code it stands for."""
    print(error, file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    code = getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 1


def guarded(program: str, command: Callable[[], int]) -> int:
    """Run ``command``; whatever it raises becomes a line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Names and console logs are bytes to Xen; those that are not UTF-8 pass through as they are.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
    try:
        code = command()
        sys.stdout.flush()
        return code
    except PyxenError as error:
        _flush()
        return complain(error)
    except KeyboardInterrupt:
        _flush()
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush it again.
        _drop_output()
        return 1
    except Exception as error:
        if os.environ.get("PYXEN_DEBUG"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"{program}: internal error: {text}", file=sys.stderr)
        print("hint: this is a bug of pyxen; PYXEN_DEBUG=1 shows where", file=sys.stderr)
        return 1


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
