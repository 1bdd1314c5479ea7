# SPDX-License-Identifier: GPL-2.0-only
"""For tests of guests, drivers and toolstacks: a host without an event loop, time that stands still, scripted guests.

* :class:`BlockingHost` and the fixture ``pyxen_host`` (``pyxen.testing.pytest_plugin``): a whole host for plain
  functions.
* :class:`VirtualClock`: ``Host(clock=VirtualClock())`` moves only when the test says so.
* :func:`scripted_engine`: ``Host(engine=scripted_engine(guest))`` runs a Python generator where a kernel would run.
* xenstored without a hypervisor: ``XenstoreDaemon(None)``, with guests' rings as plain pages (``introduce_ring``).
"""

from __future__ import annotations

from pyxen.machine.clock import VirtualClock
from pyxen.machine.cpu.scripted import Cpuid, Fault, Load, ScriptedCpu, Set, Spin, Store, Syscall
from pyxen.testing.blocking import BlockingHost
from pyxen.testing.scripted import scripted_engine
from pyxen.xenstore.daemon import XenstoreDaemon

__all__ = [
    "BlockingHost",
    "Cpuid",
    "Fault",
    "Load",
    "ScriptedCpu",
    "Set",
    "Spin",
    "Store",
    "Syscall",
    "VirtualClock",
    "XenstoreDaemon",
    "scripted_engine",
]
