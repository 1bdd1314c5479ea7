# SPDX-License-Identifier: GPL-2.0-only
"""The grammar of xl.cfg and the messages of its errors; the expected texts were recorded from libxlutil 4.17."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyxen.errors import ConfigError
from pyxen.toolstack.config.settings import Settings
from pyxen.toolstack.config.syntax import MAX_DEPTH, MAX_REPORTS, ConfigSyntaxError, Value, parse_text
from tests.config.libxlu import LibXlu

PYTHON = [
    "warning: Config file looks like it contains Python code.",
    "warning:  Arbitrary Python is no longer supported.",
    "warning:  See https://wiki.xen.org/wiki/PythonInXlConfig",
]
SYNTAX = "config parsing error near {}: syntax error, unexpected {}, expecting {}"
START = "$end or IDENT or NEWLINE or ';'"
VALUE = "STRING or NUMBER or '['"


def values(text: str) -> dict[str, Value]:
    return {name: setting.value for name, setting in parse_text(text, "F").items()}


def reports(text: str) -> list[str]:
    with pytest.raises(ConfigSyntaxError) as caught:
        parse_text(text, "F")
    return list(caught.value.reports)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("\n\n#only a comment\n;;", {}),
        ("a=1", {"a": "1"}),
        ("a = 0x1f ; b_9 = 'x'\n", {"a": "0x1f", "b_9": "x"}),
        ("\ta\t=\t1\n", {"a": "1"}),
        ("a=1#c\nb=2 # d\n", {"a": "1", "b": "2"}),
        ("a.b=5", {"a.b": "5"}),
        ('a="x#y;z" # c\n', {"a": "x#y;z"}),
        ("a='x\"y'\nb=\"x'y\"", {"a": 'x"y', "b": "x'y"}),
        (r'a="\a\b\f\n\r\t\v\\\'\""', {"a": "\a\b\f\n\r\t\v\\'\""}),
        (r"a='\x41\101\x7e'", {"a": "AA~"}),
        ("a=''", {"a": ""}),
        ("a=[]", {"a": ()}),
        ("a=[\n\n]\n", {"a": ()}),
        ("a=[1,'2',]", {"a": ("1", "2")}),
        ('a=[\n1 # one\n,\n"2"\n,\n# nothing\n]\nb=1', {"a": ("1", "2"), "b": "1"}),
        ("a=[[1,\n2],\n\n3\n,[[]]]", {"a": (("1", "2"), "3", ((),))}),
        ("a=1\na=2\n", {"a": "2"}),
        ('a="x"\na+="y"\na+=5', {"a": "xy5"}),
        ('a+="x"', {"a": "x"}),
        ('a=["x"]\na+=["y","z"]', {"a": ("x", "y", "z")}),
        ('a="x"\na+="y"\na=["z"]', {"a": ("z",)}),
        ("name='h0'; type=\"hvm\"", {"name": "h0", "type": "hvm"}),
    ],
)
def test_accepted(text: str, expected: dict[str, Value]) -> None:
    assert values(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory = 12 34\n", ["F:1: " + SYNTAX.format("`34'", "NUMBER", "$end")]),
        ("a=xyz\n", ["F:1: " + SYNTAX.format("`xyz'", "IDENT", VALUE)]),
        ("x=1\na=\n", ["F:1: " + SYNTAX.format("<newline>", "NEWLINE", VALUE)]),
        ("x=1\na=#c\n", ["F:1: " + SYNTAX.format("`#c'", "NEWLINE", VALUE)]),
        ("a=[\n", ["F:1: " + SYNTAX.format("`'", "$end", "']'")]),
        ("a=[1\n\n\n", ["F:3: " + SYNTAX.format("`'", "$end", "']'")]),
        ("a=[1 2]\n", ["F:1: " + SYNTAX.format("`2'", "NUMBER", "']'")]),
        ("a=[,]\n", ["F:1: " + SYNTAX.format("`,'", "','", "']'")]),
        ("a=[1,,2]\n", ["F:1: " + SYNTAX.format("`,'", "','", "']'")]),
        ("a b\n", ["F:1: " + SYNTAX.format("`b'", "IDENT", "+= or '='")]),
        ("=1\n", ["F:1: " + SYNTAX.format("`='", "'='", START)]),
        ("a+=+=1\n", ["F:1: " + SYNTAX.format("`+='", "+=", VALUE)]),
        ("a", ["F:1: " + SYNTAX.format("`'", "$end", "+= or '='")]),
        ('a="x" "y"\nb c\n', ["F:1: " + SYNTAX.format('`"y"\'', "STRING", "$end")]),
        # After an error three good tokens are needed before the next is told.
        ("a=b\nc=d\n", [f"F:{n}: " + SYNTAX.format(f"`{c}'", "IDENT", VALUE) for n, c in ((1, "b"), (2, "d"))]),
        ("x\n=1\n", ["F:0: " + SYNTAX.format("<newline>", "NEWLINE", "+= or '='")]),
        (
            "a=[;\n]\nb=1\nc d\n",
            ["F:1: " + SYNTAX.format("`;'", "';'", "']'"), "F:4: " + SYNTAX.format("`d'", "IDENT", "+= or '='")],
        ),
        # Lexical errors: one a line is enough.
        ("a=@ b=2\n", ["F:1: config parsing error near `@': lexical error"]),
        ("Abc=1\n", ["F:1: config parsing error near `Abc=1': lexical error"]),
        ("a=0X1f\n", ["F:1: config parsing error near `X1f': lexical error"]),
        ('a="x\nb=1\n', ["F:1: config parsing error near `\"x': lexical error"]),
        ("a=1\n#last line", ["F:2: config parsing error near `#last': lexical error"]),
        ("a=-1\n", ["F:1: config parsing error near `-1': lexical error", *PYTHON]),
        (
            "def f():\n  return 1\n",
            [
                "F:1: " + SYNTAX.format("`f'", "IDENT", "+= or '='"),
                "F:1: config parsing error near `():': lexical error",
                *PYTHON,
            ],
        ),
        ('a="\\z"\n', ['F:1: config parsing error near `"\\z"\': invalid character after backlash in quoted string']),
        (
            'a="\\x4g"\n',
            [
                'F:1: config parsing error near `"\\x4g"\': '
                "invalid digit after backslash hexnumerical character escape in quoted string"
            ],
        ),
        ('a=["x"]\na+="y"\n', ['F:2: config parsing error near `"y"\': can\'t add [list] to "string" or vice versa']),
        ('a="x"\na+=["y"]\n', ["F:2: config parsing error near `]': can't add [list] to \"string\" or vice versa"]),
    ],
)
def test_refused_with_libxlu_words(text: str, expected: list[str]) -> None:
    assert reports(text) == expected


def test_error_knows_its_real_line() -> None:
    with pytest.raises(ConfigSyntaxError) as caught:
        parse_text("a=1\nb=\n", "F")
    assert caught.value.line == 2


def test_nul_characters_are_refused() -> None:
    # libxlu dies of an assertion on the first.
    assert reports('a="x\0y"\n')[0] == "F:1: config parsing error near `\"x': lexical error"
    assert reports("a=1\0b=2\n")[0] == "F:1: config parsing error near `': lexical error"
    assert "octalnumerical" in reports('a="\\000"')[0]


def test_depth_is_bounded() -> None:
    assert values("a=" + "[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert reports("a=" + "[" * 100_000) == ["F:1: config parsing error near `[': lists nested too deeply"]


def test_size_and_number_of_reports_are_bounded() -> None:
    with pytest.raises(ConfigError, match="larger than 1024 KiB"):
        parse_text("#" * (1 << 20) + "\n", "F")
    assert len(reports("@\n" * 1000)) == MAX_REPORTS
    assert max(map(len, reports("a=" + "b" * 100_000))) < 400


@pytest.mark.parametrize(
    "piece", ['a+="x"\n', 'a+=["x"]\n', '"', "'\\", '"\\', "a=[[", '"x "', "a=1;", "@ ", "a\n", "[", "[1,"]
)
def test_a_mebibyte_of_anything_takes_seconds_at_most(piece: str) -> None:
    text = (piece * (1 << 20))[: 1 << 20]
    start = time.process_time()
    try:
        parse_text(text, "F")
    except ConfigError:
        pass
    assert time.process_time() - start < 8


def test_numbers_as_strtol() -> None:
    text = 'a=10;b=010;c=0x10;d="-5";e=" +7";f="08";g="1f";h="";i="64 ";j=[1]'
    text += ";k=99999999999999999999;m=0x;n=0\nl=1\nl+=2"
    s = Settings("F", parse_text(text, "F"))
    assert [s.integer(name) for name in "abcdefghijkmnlz"] == [10, 8, 16, -5, 7, *[None] * 7, 0, None, None]
    assert s.warnings == (
        *(f"F:1: warning: parameter `{name}' is not a valid number" for name in "fghi"),
        "F:1: warning: parameter `j' is a list but should be a single value",
        "F:1: warning: parameter `k' could not be parsed as a number: Numerical result out of range",
        "F:1: warning: parameter `m' is not a valid number",
        "F:3: warning: can't use += with numbers for parameter `l'",
    )


def test_list_asked_of_a_string_is_warned_of() -> None:
    s = Settings("F", parse_text("x=1\na='y'", "F"))
    assert s.items("a") is None
    assert s.warnings == ("F:2: warning: parameter `a' is a single value but should be a list",)


PIECES = st.sampled_from(
    [
        "a",
        "b.c",
        "x9_",
        "1",
        "0x1f",
        '"s"',
        "'t u'",
        '"',
        "'",
        "\\",
        "=",
        "+=",
        "=",
        "=",
        ",",
        "[",
        "]",
        "[",
        "]",
        ";",
        "\n",
    ]
    + [
        "\n",
        " ",
        "\t",
        "#c\n",
        "#",
        "@",
        "-",
        "+",
        "(",
        "A",
        "\r",
        '"\\n"',
        '"\\q"',
        '"\\""',
        "é",
        "a=1\n",
        "b=[1,2]\n",
    ]
    + ['a+="x"\n', 'a+=["x"]\n', "a=\n", "c=[\n"]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=20).map("".join) | st.text(max_size=60))
def test_never_anything_but_config_error(text: str) -> None:
    try:
        found = parse_text(text, "F")
    except ConfigSyntaxError as error:
        assert error.reports and str(error) == error.reports[0]
        assert "\0" not in str(error)
    else:
        assert all(
            setting.name == name and 1 <= setting.line <= text.count("\n") + 1 for name, setting in found.items()
        )


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=16).map("".join))
def test_agrees_with_libxlu(text: str) -> None:
    try:
        real = LibXlu()
    except OSError as error:
        pytest.skip(str(error))
    # Its lexer forgets an error in the last character of a file; a newline at the end avoids that.
    text += "\n"
    names = ("a", "b", "b.c", "x9_", "c")
    theirs, their_values = real.read(text, strings=names)
    theirs = [line for line in theirs if "warning: param" not in line]
    try:
        ours = {name: value for name, value in values(text).items() if isinstance(value, str) and name in names}
    except ConfigSyntaxError as error:
        if any("lexical" in line for line in error.reports):
            # After a lexical error it may miss further ones.
            assert theirs[0] == error.reports[0]
        else:
            assert theirs == list(error.reports)
    else:
        assert theirs == []
        assert ours == their_values
