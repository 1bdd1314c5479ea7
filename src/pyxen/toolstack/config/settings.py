# SPDX-License-Identifier: GPL-2.0-only
"""Typed access to the settings of one file, with the warnings that libxlu prints when a value has the wrong shape.

A setting of the wrong shape is warned of and then treated as absent; that is xl's rule, not an oversight
(``memory = "lots"`` leaves the default).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pyxen.toolstack.config.syntax import Setting, Value

_LONG = re.compile(r"[ \t\n\v\f\r]*([+-]?)(0x[0-9a-fA-F]+|[0-9]+)")
_LONG_MAX = (1 << 63) - 1
_MAX_DIGITS = 32


class Settings:
    """What one configuration says.  Reading collects ``warnings`` (each once, in order)."""

    def __init__(self, source: str, settings: Mapping[str, Setting]) -> None:
        self.source = source
        self._settings = dict(settings)
        self._warnings: dict[str, None] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    def __iter__(self) -> Iterator[Setting]:
        return iter(self._settings.values())

    def __contains__(self, name: str) -> bool:
        return name in self._settings

    def value(self, name: str) -> Value | None:
        """The raw value of ``name``, or None."""
        setting = self._settings.get(name)
        return None if setting is None else setting.value

    def warn(self, setting: Setting | None, text: str) -> None:
        """Add a warning, in xl's form when it concerns the place of ``setting``."""
        place = "" if setting is None else f"{self.source}:{setting.line}: warning: "
        self._warnings[place + text] = None

    def string(self, name: str) -> str | None:
        """``xlu_cfg_get_string``: the string or number as written."""
        setting = self._settings.get(name)
        if setting is None:
            return None
        if isinstance(setting.value, str):
            return setting.value
        self.warn(setting, f"parameter `{name}' is a list but should be a single value")
        return None

    def integer(self, name: str) -> int | None:
        """``xlu_cfg_get_long``: what C's strtol(…, 0) makes of it: decimal, 0 octal, 0x hexadecimal, sign allowed."""
        text = self.string(name)
        if text is None:
            return None
        setting = self._settings[name]
        if setting.added:
            self.warn(setting, f"can't use += with numbers for parameter `{name}'")
            return None
        match = _LONG.fullmatch(text)
        digits = match.group(2) if match else ""
        if match is None or (digits[0] == "0" and len(digits) > 1 and digits[1] != "x" and not _is_octal(digits)):
            self.warn(setting, f"parameter `{name}' is not a valid number")
            return None
        value = _LONG_MAX + 1
        if len(digits) <= _MAX_DIGITS:
            value = int(digits, 8 if _is_octal(digits) else 0 if digits.startswith("0x") else 10)
        if value > _LONG_MAX:
            text = f"parameter `{name}' could not be parsed as a number: Numerical result out of range"
            self.warn(setting, text)
            return None
        return -value if match.group(1) == "-" else value

    def boolean(self, name: str) -> bool | None:
        """``xlu_cfg_get_defbool``: a number, true unless zero."""
        value = self.integer(name)
        return None if value is None else value != 0

    def items(self, name: str) -> tuple[Value, ...] | None:
        """``xlu_cfg_get_list``: the list's items."""
        setting = self._settings.get(name)
        if setting is None:
            return None
        if isinstance(setting.value, str):
            self.warn(setting, f"parameter `{name}' is a single value but should be a list")
            return None
        return setting.value


def _is_octal(digits: str) -> bool:
    return digits[0] == "0" and digits.isdigit() and not set(digits) & {"8", "9"}
