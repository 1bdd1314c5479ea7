# SPDX-License-Identifier: GPL-2.0-only
"""The run directory keeps users apart: it is ours and closed, or it is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pyxen.cli.rundir import MAX_SOCKET_PATH_BYTES, console_socket, ensure_run_dir, run_dir
from pyxen.errors import HostError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYXEN_RUNDIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def refusal() -> str:
    with pytest.raises(HostError) as caught:
        ensure_run_dir()
    assert caught.value.hint
    return str(caught.value)


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_dir() == f"/tmp/pyxen-{os.geteuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert run_dir() == f"/tmp/pyxen-{os.geteuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert run_dir() == f"/tmp/pyxen-{os.geteuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run_dir() == f"{tmp_path}/pyxen"
    monkeypatch.setenv("PYXEN_RUNDIR", f"{tmp_path}/other/../own/")
    assert run_dir() == f"{tmp_path}/own"


def test_made_closed_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYXEN_RUNDIR", str(tmp_path / "a" / "b"))
    before = os.umask(0o277)
    try:
        path = ensure_run_dir()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o700
    assert ensure_run_dir() == path


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o707])
def test_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    monkeypatch.setenv("PYXEN_RUNDIR", str(tmp_path / "r"))
    (tmp_path / "r").mkdir()
    (tmp_path / "r").chmod(mode)
    assert f"is open to other users (mode {mode:04o}" in refusal()
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == mode


def test_link_and_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch(mode=0o600)
    monkeypatch.setenv("PYXEN_RUNDIR", str(tmp_path / "link"))
    assert refusal().endswith("is a symbolic link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("PYXEN_RUNDIR", str(tmp_path / "dangling"))
    assert refusal().endswith("is a symbolic link")
    monkeypatch.setenv("PYXEN_RUNDIR", str(tmp_path / "file"))
    assert refusal().endswith("is not a folder")
    monkeypatch.setenv("PYXEN_RUNDIR", str(tmp_path / "file" / "x"))
    assert "Not a directory" in refusal()


def test_somebody_elses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r").mkdir(mode=0o700)
    monkeypatch.setenv("PYXEN_RUNDIR", str(tmp_path / "r"))
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert refusal().endswith(f"belongs to another user (uid {owner})")


def test_too_long_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = MAX_SOCKET_PATH_BYTES - len("/console/65535")
    path = "/tmp/" + "x" * longest
    monkeypatch.setenv("PYXEN_RUNDIR", path)
    assert "too long" in refusal()
    assert not os.path.exists(path)
    assert len(console_socket("/" * longest, 65535)) == MAX_SOCKET_PATH_BYTES
