# SPDX-License-Identifier: GPL-2.0-only
"""Reading what a client sent: bounded bodies, typed fields, one-line refusals.

The socket is the user's own (mode 0600, peer's uid checked), but what arrives on it is still only bytes.
"""

from __future__ import annotations

import json
from typing import Final

from starlette.requests import Request

from pyxen.errors import PyxenError

MAX_BODY_BYTES: Final = 4 << 20
"""A 1 MiB configuration may be up to four times as long once JSON has escaped it... and no longer."""
MAX_CONFIG_CHARACTERS: Final = 1 << 20
MAX_LIST_ITEMS: Final = 1024
MAX_NUMBERS: Final = 8192


class BadRequest(PyxenError):
    """The request is not one that this API knows; ``status`` is the HTTP status to answer with."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


async def read_fields(request: Request) -> Fields:
    """The JSON object in the request's body (an empty body is an empty object). Raises BadRequest."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BadRequest(f"request body is longer than {MAX_BODY_BYTES} bytes", 413)
    if not body:
        return Fields({})
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"request body is not JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise BadRequest("request body is not a JSON object")
    return Fields(value)


def query_number(request: Request, name: str, default: float, maximum: float = 2.0**53) -> float:
    """A non-negative number from the query string, cut off at ``maximum``. Raises BadRequest."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:  # NaN too
        raise BadRequest(f"{name}= is not a number that can be used here")
    return min(value, maximum)


def query_flag(request: Request, name: str) -> bool:
    return request.query_params.get(name, "") not in ("", "0", "false")


class Fields:
    """A JSON object whose members are taken out by name and type; what nobody took is an error.

    Refusing members that are not known is what makes a misspelled option visible.
    """

    def __init__(self, values: dict[str, object]) -> None:
        self._values = dict(values)

    def text(self, name: str, default: str | None = None, maximum: int = 4096) -> str | None:
        value = self._values.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, str) or "\0" in value:
            raise BadRequest(f"{name}: a text is expected")
        if len(value) > maximum:
            raise BadRequest(f"{name}: longer than {maximum} characters", 413)
        return value

    def required_text(self, name: str, maximum: int = 4096) -> str:
        value = self.text(name, None, maximum)
        if value is None:
            raise BadRequest(f"{name} is missing")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadRequest(f"{name}: true or false is expected")
        return value

    def number(self, name: str, minimum: int, maximum: int) -> int | None:
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise BadRequest(f"{name}: a whole number from {minimum} to {maximum} is expected")
        return value

    def required_number(self, name: str, minimum: int, maximum: int) -> int:
        value = self.number(name, minimum, maximum)
        if value is None:
            raise BadRequest(f"{name} is missing")
        return value

    def numbers(self, name: str, minimum: int, maximum: int) -> list[int]:
        value = self._values.pop(name, None)
        if value is None:
            return []
        if (
            not isinstance(value, list)
            or len(value) > MAX_NUMBERS
            or not all(type(item) is int and minimum <= item <= maximum for item in value)
        ):
            raise BadRequest(f"{name}: a list of at most {MAX_NUMBERS} numbers from {minimum} to {maximum} is expected")
        return list(value)

    def texts(self, name: str, maximum: int = 4096) -> list[str]:
        value = self._values.pop(name, None)
        if value is None:
            return []
        if (
            not isinstance(value, list)
            or len(value) > MAX_LIST_ITEMS
            or not all(isinstance(item, str) and len(item) <= maximum for item in value)
        ):
            raise BadRequest(f"{name}: a list of at most {MAX_LIST_ITEMS} texts is expected")
        return list(value)

    def finish(self) -> None:
        """Every member must have been taken. Raises BadRequest."""
        if self._values:
            raise BadRequest(f"unknown member of the request: {sorted(self._values)[0][:60]}")
