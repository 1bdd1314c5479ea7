# SPDX-License-Identifier: GPL-2.0-only
"""The syntax of xl.cfg(5): text in, an ordered table of settings out.

One grammar serves the keyed and the old Python-style files, because Xen's own reader (libxlu) accepts only the part of
Python that both share: ``name = value`` or ``name += value``, one statement a line or separated by ``;``, where a value
is a string in either quotes, a number, or a list (nested, over several lines, trailing comma allowed).  ``#`` starts a
comment.

The messages are libxlu's, down to its quirks, so that a file that fails here fails on a real host with the same line:

* after a complete assignment the only thing it says it expected is ``$end``, and it gives up there;
* an unexpected end of line is reported one line early;
* a comment needs its newline: on the last line without one it is a lexical error;
* after one error it stays silent until three tokens were good (the usual rule of LALR parsers), and one line
  with a lexical error has no second message.

One thing differs on purpose: libxlu's ``\\xHH`` never works and its ``\\OOO`` yields a NUL; both mean what they say
here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Union

from pyxen.errors import ConfigError

MAX_TEXT_CHARS = 1 << 20
"""A domain configuration longer than this is refused unread."""

MAX_DEPTH = 64
"""Lists nested deeper than this are refused (the deepest option, ``vsnd``, needs two)."""

MAX_REPORTS = 50
"""Errors kept for one file; a binary fed as a configuration has one on each line."""

_MAX_NEAR_CHARS = 200

Value = Union[str, "tuple[Value, ...]"]
"""A string or number (as written, undecoded) or a list of values."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One option with the line (1-based) of its last assignment; ``added`` when that was a ``+=``."""

    name: str
    value: Value
    line: int
    added: bool = False


class ConfigSyntaxError(ConfigError):
    """The text is not a configuration; ``reports`` has xl's message for each place, in order."""

    def __init__(self, reports: list[str], *, line: int | None) -> None:
        super().__init__(reports[0], line=line)
        self.reports = tuple(reports)


_TOKEN = re.compile(
    r"""(?P<space>[ \t]+)
      | (?P<IDENT>[a-z][_0-9a-z.]*)
      | (?P<NUMBER>[0-9][0-9a-fx]*)
      | (?P<add>\+=)
      | (?P<punct>[,\[\]=;])
      | (?P<NEWLINE>\n|\#[^\n]*\n)
      | (?P<STRING>"[^"\\\n\0]*(?:\\[^\n\0][^"\\\n\0]*)*"|'[^'\\\n\0]*(?:\\[^\n\0][^'\\\n\0]*)*')
      | (?P<bad>[^ \t\n]+)
    """,
    re.VERBOSE,
)
_LOOKS_LIKE_PYTHON = frozenset("+-.():")
_PYTHON_HINT = (
    "warning: Config file looks like it contains Python code.",
    "warning:  Arbitrary Python is no longer supported.",
    "warning:  See https://wiki.xen.org/wiki/PythonInXlConfig",
)

_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", "'": "'", '"': '"'}
_OCTAL = re.compile(r"[0-3][0-7]{2}")
_HEX = re.compile(r"[0-9A-Fa-f]{2}")

_START = "$end or IDENT or NEWLINE or ';'"
_OPERATOR = "+= or '='"
_VALUE = "STRING or NUMBER or '['"


class _Abort(Exception):
    """The parser cannot go on; the reports are complete."""


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._position = 0
        self._next_line = 1
        self._lexical_error_line = 0
        self._looks_like_python = False
        # Good tokens still needed before another syntax error is reported (bison's yyerrstatus).
        self._quiet = 0
        self.first_error_line: int | None = None
        self.reports: list[str] = []
        # Name: line and whether added of the last assignment, and the values to be put together.
        self._assigned: dict[str, tuple[int, bool, list[Value]]] = {}
        self.kind = ""
        self.token = ""
        self._string = ""
        self.line = 1

    # Tokens

    def _advance(self) -> None:
        """Read the next token into ``kind``, ``token`` and ``line``; report what is none on the way."""
        while True:
            match = _TOKEN.match(self._text, self._position)
            if match is None:
                # ``line`` stays that of the last token, as libxlu has it.
                self.kind, self.token = "$end", ""
                return
            self._position = match.end()
            kind, token = match.lastgroup or "", match.group()
            self.line = self._next_line
            if kind == "space":
                continue
            if kind == "bad":
                self._lexical_error(token)
                continue
            if kind == "NEWLINE":
                self._next_line += 1
            elif kind == "punct":
                kind = f"'{token}'"
            elif kind == "add":
                kind = "+="
            elif kind == "STRING":
                self._string = self._dequote(token)
            self.kind, self.token = kind, token
            return

    def _shift(self) -> None:
        """Take the current token as good and go to the next."""
        self._quiet = max(0, self._quiet - 1)
        self._advance()

    # Reports

    def _report(self, near: str, message: str, *, line: int | None = None) -> None:
        line = self.line if line is None else line
        if self.first_error_line is None:
            self.first_error_line = self.line
        if len(self.reports) == MAX_REPORTS:
            raise _Abort
        self.reports.append(f"{self._source}:{line}: config parsing error near {near}: {message}")

    def _lexical_error(self, token: str, message: str = "lexical error") -> None:
        self._looks_like_python |= message == "lexical error" and token[0] in _LOOKS_LIKE_PYTHON
        self._lexical_error_line = self.line
        self._report(_quoted(token), message)

    def _syntax_error(self, expecting: str) -> None:
        if self._quiet or self._lexical_error_line == self.line:
            return
        near, line = _quoted(self.token), self.line
        if self.kind == "NEWLINE":
            comment = self.token.rstrip("\n")
            near, line = _quoted(comment.rstrip()) if comment else "<newline>", line - 1
        self._report(near, f"syntax error, unexpected {self.kind}, expecting {expecting}", line=line)

    def _recover(self) -> None:
        """Skip to the start of the next line."""
        while self.kind != "NEWLINE":
            if self.kind == "$end":
                raise _Abort
            self._advance()
        self._quiet = 3
        self._shift()

    # Grammar

    def parse(self) -> None:
        try:
            self._advance()
            while self.kind != "$end":
                if self.kind in ("NEWLINE", "';'"):
                    self._shift()
                elif not self._assignment():
                    self._recover()
        except _Abort:
            pass
        if self._looks_like_python:
            self.reports.extend(_PYTHON_HINT)

    def _assignment(self) -> bool:
        """Parse one assignment and its end; False after an error that the next line may recover from."""
        if self.kind != "IDENT":
            self._syntax_error(_START)
            return False
        name, line = self.token, self.line
        self._shift()
        if self.kind not in ("'='", "+="):
            self._syntax_error(_OPERATOR)
            return False
        add = self.kind == "+="
        self._shift()
        value = self._value(name, line, add)
        if value is None:
            return False
        if self.kind in ("NEWLINE", "';'"):
            self._shift()
        elif self.kind != "$end":
            self._syntax_error("$end")
            raise _Abort
        return True

    def _value(self, name: str, line: int, add: bool) -> Value | None:
        if self.kind in ("STRING", "NUMBER"):
            value: Value | None = self._atom()
        elif self.kind == "'['":
            value = self._list()
        else:
            self._syntax_error(_VALUE)
            return None
        if value is not None:
            # Before the next token is read: a conflict is reported at the last token of the value.
            self._assign(name, value, line, add)
            self._shift()
        return value

    def _atom(self) -> str:
        return self.token if self.kind == "NUMBER" else self._string

    def _list(self) -> Value | None:
        """Parse a list up to, not including, its last bracket (no recursion: depth is the file's choice)."""
        stack: list[list[Value]] = []
        may_start = True
        while True:
            while self.kind == "NEWLINE" and stack:
                self._shift()
            if self.kind == "'['" and may_start:
                if len(stack) == MAX_DEPTH:
                    self._report("`['", "lists nested too deeply")
                    raise _Abort
                stack.append([])
                self._shift()
            elif self.kind in ("STRING", "NUMBER") and may_start:
                stack[-1].append(self._atom())
                may_start = False
                self._shift()
            elif self.kind == "','" and not may_start:
                may_start = True
                self._shift()
            elif self.kind == "']'":
                done = tuple(stack.pop())
                if not stack:
                    return done
                stack[-1].append(done)
                may_start = False
                self._shift()
            else:
                self._syntax_error("']'")
                return None

    def _assign(self, name: str, value: Value, line: int, add: bool) -> None:
        parts = self._assigned[name][2] if add and name in self._assigned else []
        if parts and isinstance(parts[0], str) is not isinstance(value, str):
            # As libxlu: values count for nothing once the file has failed.
            if not self.reports:
                self._report(_quoted(self.token), 'can\'t add [list] to "string" or vice versa')
            return
        parts.append(value)
        self._assigned[name] = (line, add, parts)

    def settings(self) -> dict[str, Setting]:
        """What was assigned.  Additions are joined here, once: a file may hold a hundred thousand of one name."""
        found: dict[str, Setting] = {}
        for name, (line, add, parts) in self._assigned.items():
            if isinstance(parts[0], str):
                value: Value = "".join(part for part in parts if isinstance(part, str))
            else:
                value = tuple(item for part in parts for item in part)
            found[name] = Setting(name, value, line, add)
        return found

    def _dequote(self, token: str) -> str:
        body = token[1:-1]
        # As libxlu: once the file has failed, what its strings hold does not matter.
        if "\\" not in body or self.reports:
            return body
        out: list[str] = []
        position = 0
        while (backslash := body.find("\\", position)) >= 0:
            out.append(body[position:backslash])
            escape = body[backslash + 1]
            position = backslash + 2
            if escape in _ESCAPES:
                out.append(_ESCAPES[escape])
                continue
            if escape == "x":
                digits, base, what = _HEX.match(body, position), 16, "hexnumerical"
            elif escape in "01234567":
                position -= 1
                digits, base, what = _OCTAL.match(body, position), 8, "octalnumerical"
            else:
                self._lexical_error(token, "invalid character after backlash in quoted string")
                return body
            # A NUL would end the string for every C program that reads it later.
            if digits is None or int(digits.group(), base) == 0:
                self._lexical_error(token, f"invalid digit after backslash {what} character escape in quoted string")
                return body
            out.append(chr(int(digits.group(), base)))
            position = digits.end()
        out.append(body[position:])
        return "".join(out)


def _quoted(token: str) -> str:
    # libxlu prints a C string: it ends at a NUL.
    token = token.partition("\0")[0]
    if len(token) > _MAX_NEAR_CHARS:
        token = token[:_MAX_NEAR_CHARS] + "..."
    return f"`{token}'"


def parse_text(text: str, source: str) -> dict[str, Setting]:
    """Parse ``text``; ``source`` is the file name for messages.  The last assignment of a name wins.

    Bytes that are not UTF-8 are expected as ``surrogateescape`` decodes them.  Raises ConfigSyntaxError with every
    report libxlu would print.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise ConfigError(f"{source}: configuration is larger than {MAX_TEXT_CHARS >> 10} KiB")
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(f"{source}: configuration is not text") from None
    parser = _Parser(text, source)
    parser.parse()
    if parser.reports:
        raise ConfigSyntaxError(parser.reports, line=parser.first_error_line)
    return parser.settings()
