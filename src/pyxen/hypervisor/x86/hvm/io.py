# SPDX-License-Identifier: GPL-2.0-only
"""I/O ports of a PVH guest: the ACPI power-management block and the debug port (Xen: xen/arch/x86/hvm/pmtimer.c,
hvm_print_line in hvm.c).  A PVH guest has no PIT, PIC, RTC or keyboard controller; ports without a device read as all
ones and take anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.domain import ShutdownCode

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain

PM1A_STS: Final = 0xB000
PM1A_EN: Final = 0xB002
PM1A_CNT: Final = 0xB004
PM_TMR: Final = 0xB008
"""ACPI_PM1A_EVT_BLK_ADDRESS_V1 and its fellows (xen/include/public/hvm/ioreq.h)."""
DEBUG_PORT: Final = 0xE9

PM_TIMER_HZ: Final = 3579545
_SCI_EN: Final = 1
_SLP_EN: Final = 1 << 13
_SLP_TYP_S5: Final = 0
"""What our \\_S5 package says."""
_LINE: Final = 80


class PlatformIo:
    """The ports of one domain."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._pm1_status = 0
        self._pm1_enable = 0
        self._line = bytearray()

    def read(self, port: int, size: int) -> int:
        """IN. All ones where nothing answers."""
        if port >= PM1A_STS and port + size <= PM_TMR + 4:
            block = self._pm_block()
            offset = port - PM1A_STS
            return int.from_bytes(block[offset : offset + size], "little")
        if port == DEBUG_PORT and size == 1:
            return DEBUG_PORT  # how a guest finds out that the port is there
        return (1 << 8 * size) - 1

    def _pm_block(self) -> bytes:
        ticks = self._domain.hypervisor.scheduler.now_ns() * PM_TIMER_HZ // 1_000_000_000
        return b"".join((
            self._pm1_status.to_bytes(2, "little"), self._pm1_enable.to_bytes(2, "little"),
            _SCI_EN.to_bytes(2, "little"), bytes(2), (ticks & 0xFFFFFFFF).to_bytes(4, "little"),
        ))

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        if port == PM1A_CNT and size >= 2:
            if value & _SLP_EN and value >> 10 & 7 == _SLP_TYP_S5:
                self._domain.hypervisor.scheduler.domain_shutdown(self._domain, ShutdownCode.POWEROFF)
        elif port == PM1A_STS and size == 2:
            self._pm1_status &= ~value
        elif port == PM1A_EN and size == 2:
            self._pm1_enable = value & 0xFFFF
        elif port == DEBUG_PORT and size == 1:
            self._debug(value & 0xFF)

    def _debug(self, char: int) -> None:
        """hvm_print_line(): a line a time, printable characters only."""
        if 0x20 <= char < 0x7F or char == 9:
            self._line.append(char)
        if char == 10 or len(self._line) >= _LINE:
            self._domain.hypervisor.log.guest_printk(
                self._domain.domid, f"d{self._domain.domid}: {self._line.decode('ascii')}")
            self._line.clear()
