# SPDX-License-Identifier: GPL-2.0-only
"""Deadlines that kick an engine without another thread and without the GIL.

A thread that wakes up for every time slice needs the GIL, which the engine's thread then has to take back: that was a
fifth of the CPU time of a guest whose vCPUs rotate every 200 µs. Here the kernel interrupts the engine's own thread
(timer_create(2), SIGEV_THREAD_ID) with a real-time signal, and its handler is a few instructions of ours that store
what :meth:`UnicornX86.kick` stores. No Python runs. The kernel steps over the red zone and keeps all registers, and
``ret`` goes to libc's sigreturn.

Where the handler stores, it learns from the signal: the address of a :class:`_Block`. A signal may come late, even
after its timer was deleted, so blocks are never freed, and :meth:`_Block.release` first makes the block point at
itself, then waits for handlers that are under way.

The kernel is asked only for a deadline *earlier* than the armed one: guests re-arm their timers thousands of times a
second, mostly to a later moment. The handler marks the block as not armed, so nobody counts on a timer that has fired.
A kick that came early is for :meth:`UnicornX86.run` to see; it arms again.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from ctypes import c_int, c_void_p
from typing import TYPE_CHECKING, Any

from pyxen.errors import EngineError
from pyxen.machine.clock import RealClock
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.deadline import NEVER, AlarmDeadline
from pyxen.machine.cpu.unicorn_code import JNE, CodePage

if TYPE_CHECKING:
    from pyxen.machine.cpu.unicorn_x86 import UnicornX86

_NS = 1_000_000_000
_FIRST_SIGNAL = 8           # from SIGRTMIN on: the first ones are what other programs use
_CLOCK_MONOTONIC, _SIGEV_THREAD_ID = 1, 4
_SA_SIGINFO, _SA_RESTART = 4, 0x10000000
_SIGINFO_CODE, _SIGINFO_VALUE = 8, 24                   # struct siginfo: si_code; si_value of a timer
_SI_TIMER = -2
_BLOCKS_AT_ONCE = 64
_HANDLERS_END_S = 1.0
_PROOF_S = 0.2
_MUCH_NS = 20_000           # an armed timer that is earlier than the deadline of a new run by more is armed anew


class _SigAction(ctypes.Structure):
    _fields_ = (("handler", c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", c_int), ("restorer", c_void_p))


class _SigEvent(ctypes.Structure):
    _fields_ = (("value", c_void_p), ("signo", c_int), ("notify", c_int), ("tid", c_int), ("rest", c_int * 11))


class _Block:
    """What the handler reads and writes; 64 bytes that live as long as the process."""

    SIZE = 64
    INTERRUPT, ICOUNT, BUSY, ARMED, OWN_INTERRUPT, OWN_ICOUNT = range(6)

    _free: list[_Block] = []                    # append and pop are atomic: a finalizer may come at any moment

    def __init__(self, address: int) -> None:
        self.address = address
        self.words = memoryview((ctypes.c_byte * self.SIZE).from_address(address)).cast("B").cast("q")
        self.aim_at_itself()

    @classmethod
    def take(cls) -> _Block:
        """An unused one."""
        try:
            return cls._free.pop()
        except IndexError:
            memory = ctypes.create_string_buffer((_BLOCKS_AT_ONCE + 1) * cls.SIZE)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))    # for ever
            first = -(-ctypes.addressof(memory) // cls.SIZE) * cls.SIZE
            blocks = [cls(first + n * cls.SIZE) for n in range(_BLOCKS_AT_ONCE)]
            cls._free += blocks[1:]
            return blocks[0]

    def aim(self, interrupt: int, icount: int) -> None:
        """Addresses of the two words that make an engine stop."""
        self.words[self.INTERRUPT], self.words[self.ICOUNT] = interrupt, icount

    def aim_at_itself(self) -> None:
        """From now on a handler that starts touches nothing else."""
        self.aim(self.address + 8 * self.OWN_INTERRUPT, self.address + 8 * self.OWN_ICOUNT)
        self.words[self.ARMED] = NEVER

    def release(self) -> None:
        """For another engine, once no handler can be between reading an address and storing there. The caller has
        aimed it at itself and made a system call since."""
        end = time.monotonic() + _HANDLERS_END_S
        while self.words[self.BUSY]:            # another thread is in the handler: nanoseconds
            if time.monotonic() > end:
                return                          # that thread was lost in a fork: the block is lost, too
            time.sleep(0)
        self._free.append(self)


class _Native:
    """The signal, its handler and libc's timers. Raises EngineError where the host has them not."""

    def __init__(self, near: int) -> None:
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            raise EngineError("no timer signals with native handlers on this host")
        libc = ctypes.PyDLL(None, use_errno=True)               # keeps the GIL: all calls are short
        try:
            self.create, self.settime, self.delete = libc.timer_create, libc.timer_settime, libc.timer_delete
        except AttributeError as error:
            raise EngineError("this C library has no timers") from error
        self.create.argtypes = (c_int, c_void_p, c_void_p)
        self.settime.argtypes = (c_void_p, c_int, c_void_p, c_void_p)
        self.delete.argtypes = (c_void_p,)
        page = CodePage(near)
        code = page.begin()
        code.raw("f30f1efa")                                    # endbr64
        code.raw("837e b b", _SIGINFO_CODE, _SI_TIMER)          # cmp dword [rsi+si_code], SI_TIMER
        code.branch(JNE, "not ours")
        code.raw("488b46 b", _SIGINFO_VALUE)                    # mov rax, [rsi+si_value]
        code.raw("f0 ff40 b", 8 * _Block.BUSY)                  # lock inc dword [rax+busy]
        code.raw("48c7c1 ffffffff 48d1e9")                      # mov rcx, -1; shr rcx, 1: NEVER
        code.raw("488948 b", 8 * _Block.ARMED)                  # mov [rax+armed], rcx
        code.raw("488b48 b c601 b", 8 * _Block.INTERRUPT, ui.INTERRUPT_HALT)    # mov rcx, [rax+…]; mov byte [rcx], …
        code.raw("488b48 b 66c701 ffff", 8 * _Block.ICOUNT)     # mov rcx, [rax+…]; mov word [rcx], 0xffff
        code.raw("f0 ff48 b", 8 * _Block.BUSY)                  # lock dec dword [rax+busy]
        code.label("not ours")
        code.raw("c3")
        page.place(code)
        page.seal()
        self.signal = self._install(libc, code.address)
        self._prove()

    @staticmethod
    def _install(libc: Any, handler: int) -> int:
        libc.sigaction.argtypes = (c_int, c_void_p, c_void_p)
        new = _SigAction(handler=handler, flags=_SA_SIGINFO | _SA_RESTART)
        for number in range(signal.SIGRTMIN + _FIRST_SIGNAL, signal.SIGRTMAX + 1):
            old = _SigAction()
            if libc.sigaction(number, None, ctypes.byref(old)) or old.handler:
                continue                                        # somebody uses it
            if not libc.sigaction(number, ctypes.byref(new), None):
                return number
        raise EngineError("no real-time signal is free")

    def _prove(self) -> None:
        """A timer of this thread must end up in the handler."""
        handle = _Handle(self)
        words = handle.block.words
        words[_Block.OWN_INTERRUPT] = words[_Block.OWN_ICOUNT] = 0
        try:
            if not handle.arm(1, 1):
                raise EngineError("the host refuses timers")
            end = time.monotonic() + _PROOF_S
            while words[_Block.ARMED] != NEVER:
                if time.monotonic() > end:
                    raise EngineError("timer signals do not arrive")
                time.sleep(0.0001)
            if (words[_Block.OWN_INTERRUPT], words[_Block.OWN_ICOUNT]) != (ui.INTERRUPT_HALT, 0xffff):
                raise EngineError("timer signals do not carry their value")
        finally:
            handle.release()


_installing = threading.Lock()
_native: _Native | bool | None = None
"""False: this host has it not."""


def native() -> _Native | None:
    """Set up on first use."""
    global _native
    with _installing:
        if _native is None:
            try:
                _native = _Native(ui.library().address("uc_emu_start"))
            except EngineError:
                _native = False
        return _native if isinstance(_native, _Native) else None


_here = threading.local()


def _thread() -> object:
    """What no other thread, living or dead, has: identifiers are used again."""
    try:
        return _here.token
    except AttributeError:
        _here.token = object()
        return _here.token


class _Handle:
    """One block and one timer of the kernel's, which is some thread's."""

    __slots__ = ("__weakref__", "_address", "_ids", "_native", "_spec", "_spec_words", "block", "owner", "released")

    def __init__(self, native_: _Native) -> None:
        self._native = native_
        self.block = _Block.take()
        self.owner: object = None
        self.released = False
        self._ids: list[int] = []
        self._spec = (ctypes.c_int64 * 4)()                     # struct itimerspec: interval, then value
        self._spec_words = memoryview(self._spec).cast("B").cast("q")
        self._address = ctypes.addressof(self._spec)
        _handles.add(self)

    def arm(self, deadline_ns: int, left_ns: int) -> bool:
        """Fire in ``left_ns`` (≥ 1); by the thread to be interrupted. False: the host refuses."""
        spec, armed = self._spec_words, self.block.words
        if left_ns < _NS:
            spec[2], spec[3] = 0, left_ns
        else:
            spec[2], spec[3] = divmod(left_ns, _NS)
        # Before the system call: from there on the handler may say that it has fired.
        armed[_Block.ARMED] = deadline_ns
        if self._ids and not self._native.settime(self._ids[-1], 0, self._address, None):
            return True
        if self._own() and not self._native.settime(self._ids[-1], 0, self._address, None):
            return True
        armed[_Block.ARMED] = NEVER
        return False

    def change_thread(self, owner: object) -> None:
        """The caller's thread, whose token is ``owner``, runs the engine from now on."""
        self._delete()
        self.block.words[_Block.ARMED] = NEVER
        self.owner = owner

    def forked(self) -> None:
        """This process is a child now: it has no timers, and their numbers will be those of others."""
        self._ids.clear()
        self.block.words[_Block.ARMED] = NEVER

    def _own(self) -> bool:
        self._delete()
        if self.released:
            return False
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (self._native.signal,))
        event = _SigEvent(value=self.block.address, signo=self._native.signal, notify=_SIGEV_THREAD_ID,
                          tid=threading.get_native_id())
        timer = c_void_p()
        if self._native.create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
            return False
        self._ids.append(timer.value or 0)
        return True

    def _delete(self) -> None:
        while self._ids:
            self._native.delete(self._ids.pop())

    def release(self) -> None:
        """From any thread, while nobody arms it: when this returns, no handler will touch the engine."""
        if self.released:
            return
        self.released = True
        self.block.aim_at_itself()
        self._delete()
        self.block.release()


_handles: weakref.WeakSet[_Handle] = weakref.WeakSet()


def _forked() -> None:
    for handle in list(_handles):
        handle.forked()


os.register_at_fork(after_in_child=_forked)


class KickTimer:
    """The deadline (machine.cpu.deadline.Deadline) of one engine; :meth:`make` says whether there can be one.

    ``fallback`` makes another deadline for the day on which the kernel refuses a timer (RLIMIT_SIGPENDING).
    """

    def __init__(self, clock: RealClock, handle: _Handle, fallback: Callable[[], AlarmDeadline]) -> None:
        self._now = clock.now_ns
        self._handle = handle
        self._armed = handle.block.words
        self._fallback = fallback
        self._instead: AlarmDeadline | None = None

    @classmethod
    def make(cls, cpu: UnicornX86, clock: object, words: tuple[int, int],
             fallback: Callable[[], AlarmDeadline]) -> KickTimer | None:
        """For ``cpu``, whose kick words are at ``words``; None where only an alarm thread will do: a clock that is not
        the host's, or a host that refuses."""
        native_ = native() if isinstance(clock, RealClock) else None
        if native_ is None:
            return None
        assert isinstance(clock, RealClock)
        handle = _Handle(native_)
        handle.block.aim(*words)
        # Also for an engine that nobody closed: it is gone when its Python object is.
        weakref.finalize(cpu, handle.release)
        return cls(clock, handle, fallback)

    def enter(self, deadline_ns: int | None) -> bool:
        """:meth:`set` at the start of a run, perhaps on another thread than before."""
        handle = self._handle
        thread = _thread()
        if handle.owner is not thread:
            handle.change_thread(thread)
        if deadline_ns is None or self._instead is not None:
            return self.set(deadline_ns)
        armed = self._armed[_Block.ARMED]
        # A much earlier one would fire in the middle of this run, which costs ten times as much as to arm it anew.
        if deadline_ns - _MUCH_NS <= armed <= deadline_ns:
            return True
        left = deadline_ns - self._now()
        if left <= 0:
            return False
        return handle.arm(deadline_ns, left) or self.set(deadline_ns)

    def set(self, deadline_ns: int | None) -> bool:
        """Move the deadline. A later one costs nothing: the armed one then fires early."""
        if deadline_ns is None:
            return self._instead is None or self._instead.set(None)
        if deadline_ns >= self._armed[_Block.ARMED]:
            return True
        left = deadline_ns - self._now()
        if left <= 0:
            return False
        if self._instead is None:
            if self._handle.arm(deadline_ns, left) or self._handle.released:
                return True
            self._instead = self._fallback()
        return self._instead.set(deadline_ns)

    def cancel(self) -> None:
        """No kick comes after this."""
        self._handle.release()
        if self._instead is not None:
            self._instead.cancel()
