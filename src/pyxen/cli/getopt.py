# SPDX-License-Identifier: GPL-2.0-only
"""Options of a command as getopt_long(3) reads them, for commands that must start fast (``argparse`` does not).

Options may come after operands, a long option may be shortened while that is unambiguous, ``--`` ends them.  ``-h`` and
``--help`` are options of every command, as in xl.
"""

from __future__ import annotations


class UsageError(Exception):
    """The command line is wrong; the text is xl's."""


class HelpRequested(Exception):
    """``-h`` or ``--help``."""


def getopt(args: list[str], short: str, long: dict[str, str] | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """Options, as (letter, argument or ""), and operands of ``args``.

    ``short`` are the letters, each with a ``:`` behind it when it takes an argument; ``long`` maps names to letters
    (letters that exist only there are in ``short`` too).  Raises UsageError or HelpRequested.
    """
    takes = {letter: short[i + 1 : i + 2] == ":" for i, letter in enumerate(short) if letter != ":"} | {"h": False}
    names = {"help": "h", **(long or {})}
    options: list[tuple[str, str]] = []
    operands: list[str] = []
    rest = list(reversed(args))
    while rest:
        arg = rest.pop()
        if arg == "--":
            operands.extend(reversed(rest))
            break
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            letter = _long(name, names)
            if takes[letter]:
                if not equals and not rest:
                    raise UsageError(f"option `{name}' requires an argument.")
                options.append((letter, value if equals else rest.pop()))
            elif equals:
                raise UsageError(f"option `{name}' doesn't allow an argument.")
            else:
                options.append((letter, ""))
        elif arg.startswith("-") and arg != "-":
            letters = arg[1:]
            while letters:
                letter, letters = letters[0], letters[1:]
                if letter not in takes or not letter.isalpha():
                    raise UsageError(f"option `{letter}' not supported.")
                if takes[letter]:
                    if not letters and not rest:
                        raise UsageError(f"option `{letter}' not supported.")
                    options.append((letter, letters or rest.pop()))
                    break
                options.append((letter, ""))
        else:
            operands.append(arg)
        if options and options[-1][0] == "h":
            raise HelpRequested
    return options, operands


def _long(name: str, names: dict[str, str]) -> str:
    if name in names:
        return names[name]
    found = {letter for known, letter in names.items() if name and known.startswith(name)}
    if len(found) != 1:
        raise UsageError(f"option `{name}' not supported.")
    return found.pop()
