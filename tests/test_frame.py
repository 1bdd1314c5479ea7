# SPDX-License-Identifier: GPL-2.0-only
"""The linters, run as tests, and the promises the frame of the project makes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
BIN = Path(sys.executable).parent


def tool(name: str, *arguments: str) -> None:
    """Run a linter of this environment; its findings are the failure's text."""
    program = shutil.which(name, path=str(BIN)) or shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed (pip install -e .[lint])")
    result = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
                            env={"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": "src", "NO_COLOR": "1"})
    if result.returncode:
        pytest.fail(f"{name} found:\n{result.stdout[-6000:]}{result.stderr[-2000:]}", pytrace=False)


@pytest.mark.lint
def test_ruff() -> None:
    tool("ruff", "check", "--quiet", "--output-format=concise", ".")


@pytest.mark.lint
@pytest.mark.slow
def test_mypy_strict() -> None:
    tool("mypy", "--no-error-summary")


@pytest.mark.lint
def test_import_direction() -> None:
    tool("lint-imports", "--no-cache")


@pytest.mark.lint
def test_every_source_file_names_its_licence_first() -> None:
    for source in [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        lines = source.read_text().splitlines()
        if lines and lines[0].startswith("#!"):
            del lines[0]
        assert not lines or lines[0] == "# SPDX-License-Identifier: GPL-2.0-only", source


def logical_lines(source: Path) -> int:
    return sum(1 for line in source.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#"))


@pytest.mark.lint
def test_modules_are_rooms_not_halls() -> None:
    """A module that grows past ~500 lines is asking to be two (CONTRIBUTING.md)."""
    large = {str(source.relative_to(ROOT)): logical_lines(source) for source in SOURCES}
    assert {name: lines for name, lines in large.items() if lines > 550} == {}


@pytest.mark.lint
def test_time_comes_from_the_machines_clock() -> None:
    """Below the host, only machine/clock.py asks what time it is (perf_counter may budget our own work)."""
    asks = re.compile(r"\btime\.(time|monotonic|clock_gettime)(_ns)?\b|\bdatetime\.now\(")
    floors = ("machine", "hypervisor", "xenstore", "backends", "toolstack")
    found = [
        str(source.relative_to(ROOT))
        for source in SOURCES
        if source.relative_to(ROOT / "src/pyxen").parts[0] in floors and asks.search(source.read_text())
    ]
    # clock.py is the clock; the engine's self-test and deadline measure the engine itself, not the guest's world.
    allowed = {"src/pyxen/machine/clock.py"}
    assert [name for name in found if name not in allowed and "/machine/cpu/" not in name] == []


def test_every_dependency_is_justified() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("\ndependencies = [") : text.index("\n]\n", text.index("\ndependencies = ["))]
    lines = [line for line in block.splitlines()[2:] if line.strip()]
    assert len(lines) == len(tomllib.loads(text)["project"]["dependencies"])
    for line in lines:
        assert re.search(r'",\s+# \S', line), f"say why: {line.strip()}"


def test_both_commands_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, function = target.partition(":")
        source = ROOT / "src" / (module.replace(".", "/") + ".py")
        assert f"def {function}(" in source.read_text()


def test_the_readmes_commands_are_the_makefiles() -> None:
    """Each `make X` a document tells people to type is a target."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        for command in re.findall(r"\bmake ([a-z]+)\b(?=[ `\n])", (ROOT / document).read_text()):
            assert command in targets, f"{document}: make {command}"


def test_documents_point_to_files_that_exist() -> None:
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SUPPORT.md", "CHANGELOG.md")]
    documents += sorted((ROOT / "docs").glob("*.md"))
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_licence_is_gpl_2() -> None:
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 2, June 1991" in (ROOT / "LICENSE").read_text()
