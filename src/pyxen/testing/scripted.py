# SPDX-License-Identifier: GPL-2.0-only
"""A host whose guests are Python generators (``machine.cpu.scripted``)."""

from __future__ import annotations

from collections.abc import Callable

from pyxen.machine.clock import Clock
from pyxen.machine.cpu.base import Cpu
from pyxen.machine.cpu.scripted import Script, ScriptedContext, ScriptedCpu
from pyxen.machine.memory import Memory


def scripted_engine(script: Script) -> Callable[[Memory, Clock, int], Cpu]:
    """An engine for ``Host(engine=…)`` on which every vCPU runs ``script`` (whatever kernel its domain was built of).

    A domain still is built of a kernel file: its memory, start_info and rings are real, only the instructions are not.
    """

    class Engine(ScriptedCpu):
        """A scripted CPU with a script for contexts that come without one."""

        def new_context(self, own: Script | None = None, *, cpl: int = 3) -> ScriptedContext:
            """A context; see :meth:`ScriptedCpu.new_context`."""
            return super().new_context(own or script, cpl=cpl)

    def make(memory: Memory, clock: Clock, index: int) -> Cpu:
        return Engine(memory, clock, index)

    return make
