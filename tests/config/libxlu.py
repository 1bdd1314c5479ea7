# SPDX-License-Identifier: GPL-2.0-only
"""Xen's own reader of configurations (libxlutil of Debian's xen-utils), for tests that compare ours with it."""

from __future__ import annotations

import ctypes
import ctypes.util
import os

_NAMES = ("libxlutil.so.4.17", "libxlutil.so")


class LibXlu:
    """Reads texts; raises OSError when the library is not installed."""

    def __init__(self) -> None:
        self._xlu = self._load()
        self._libc = ctypes.CDLL(None)
        self._libc.fdopen.restype = ctypes.c_void_p
        self._libc.fdopen.argtypes = [ctypes.c_int, ctypes.c_char_p]
        self._libc.fclose.argtypes = [ctypes.c_void_p]
        self._xlu.xlu_cfg_init.restype = ctypes.c_void_p
        self._xlu.xlu_cfg_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._xlu.xlu_cfg_readdata.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
        self._xlu.xlu_cfg_destroy.argtypes = [ctypes.c_void_p]
        self._xlu.xlu_cfg_get_string.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
        self._xlu.xlu_cfg_get_long.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]

    @staticmethod
    def _load() -> ctypes.CDLL:
        for name in _NAMES:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        raise OSError("libxlutil is not installed")

    def read(
        self, text: str, strings: tuple[str, ...] = (), longs: tuple[str, ...] = ()
    ) -> tuple[list[str], dict[str, object]]:
        """The reports, and (when it parsed) the values of ``strings`` and ``longs`` (absent when refused)."""
        fd = os.memfd_create("reports")
        report = self._libc.fdopen(os.dup(fd), b"w")
        config = self._xlu.xlu_cfg_init(report, b"F")
        data = text.encode()
        values: dict[str, object] = {}
        if self._xlu.xlu_cfg_readdata(config, data, len(data)) == 0:
            for name in strings:
                pointer = ctypes.c_char_p()
                if self._xlu.xlu_cfg_get_string(config, name.encode(), ctypes.byref(pointer), 0) == 0:
                    values[name] = (pointer.value or b"").decode()
            for name in longs:
                number = ctypes.c_long()
                if self._xlu.xlu_cfg_get_long(config, name.encode(), ctypes.byref(number), 0) == 0:
                    values[name] = number.value
        self._xlu.xlu_cfg_destroy(config)
        self._libc.fclose(report)
        size = os.lseek(fd, 0, os.SEEK_END)
        lines = os.pread(fd, size, 0).decode(errors="replace").split("\n")
        os.close(fd)
        return lines[:-1], values
