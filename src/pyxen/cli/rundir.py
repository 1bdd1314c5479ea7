# SPDX-License-Identifier: GPL-2.0-only
"""The run directory: the folder with a host's sockets, which is also what keeps two users' hosts apart.

$PYXEN_RUNDIR, else $XDG_RUNTIME_DIR/pyxen, else /tmp/pyxen-UID.  Whoever can write into it can stand in for the host,
and /tmp is everybody's: so it must be a real folder (no link), ours, and closed to others; anything else is refused,
never repaired.  Both ``xl`` and the host come through here.  Imports nothing but ``os`` and ``stat``: it is on the
path of every ``xl``.
"""

from __future__ import annotations

import os
import stat

from pyxen.errors import HostError

API_SOCKET = "api.sock"
CONSOLE_FOLDER = "console"
XENSTORE_SOCKET = "xenstored/socket"

MAX_SOCKET_PATH_BYTES = 107
"""``sizeof(sockaddr_un.sun_path)`` less the terminating NUL (Linux)."""

_LONGEST_SOCKET = "/console/65535"


def run_dir() -> str:
    """The absolute path of the run directory; it need not exist, and was not checked."""
    if own := os.environ.get("PYXEN_RUNDIR"):
        return os.path.abspath(own)
    xdg = os.environ.get("XDG_RUNTIME_DIR", "")
    # A login session that is over takes its folder along; /tmp is still there.
    if os.path.isabs(xdg) and os.path.isdir(xdg):
        return os.path.join(xdg, "pyxen")
    return f"/tmp/pyxen-{os.geteuid()}"


def ensure_run_dir() -> str:
    """The run directory, made if it is not there, and safe to use.  Raises HostError, in one line, otherwise."""
    path = run_dir()
    if len(os.fsencode(path)) + len(_LONGEST_SOCKET) > MAX_SOCKET_PATH_BYTES:
        longest = MAX_SOCKET_PATH_BYTES - len(_LONGEST_SOCKET)
        raise HostError(
            f"run directory {path} has too long a name for a socket in it",
            hint=f"set PYXEN_RUNDIR to a path of at most {longest} bytes",
        )
    try:
        _make(path)
        status = os.lstat(path)
    except OSError as error:
        raise HostError(
            f"run directory {path}: {error.strerror}", hint="set PYXEN_RUNDIR to a folder of your own"
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        problem = "is a symbolic link" if stat.S_ISLNK(status.st_mode) else "is not a folder"
    elif status.st_uid != os.geteuid():
        problem = f"belongs to another user (uid {status.st_uid})"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        problem = f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o}, must be 0700)"
    else:
        return path
    raise HostError(f"run directory {path} {problem}", hint="remove it or set PYXEN_RUNDIR to another folder")


def _make(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make(os.path.dirname(path))
        os.mkdir(path, 0o700)
    # Whatever the umask took away.
    os.chmod(path, 0o700)


def api_socket(path: str) -> str:
    """The host's API socket in run directory ``path``."""
    return f"{path}/{API_SOCKET}"


def console_socket(path: str, domid: int) -> str:
    """The console socket of a domain in run directory ``path``."""
    return f"{path}/{CONSOLE_FOLDER}/{domid}"
