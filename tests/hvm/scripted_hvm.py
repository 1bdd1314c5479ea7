# SPDX-License-Identifier: GPL-2.0-only
"""The scripted CPU for a test that is the engine itself: what the hypervisor asks for is noted when it asks."""

from __future__ import annotations

from pyxen.machine.cpu.base import Context
from pyxen.machine.cpu.scripted import ScriptedCpu


class HvmScriptedCpu(ScriptedCpu):
    """Nothing is delivered; the journal has what was asked for."""

    def load(self, context: Context) -> None:
        super().load(context)
        self.set_cpl(0)

    def inject_exception(self, vector: int, error_code: int | None) -> None:
        self.journal.append(("exception", vector, error_code))

    def inject_nmi(self) -> None:
        self.journal.append(("nmi",))

    def request_interrupt_window(self, on: bool) -> None:
        self.journal.append(("window", on))

    def inject_interrupt(self, vector: int) -> None:
        self.journal.append(("interrupt", vector))
