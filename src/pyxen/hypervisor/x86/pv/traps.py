# SPDX-License-Identifier: GPL-2.0-only
"""Where a PV guest leaves its own code: hypercalls, system calls, faults (Xen: xen/arch/x86/traps.c, x86_64/entry.S).

One object per vCPU, called by the engine in place (see :class:`pyxen.machine.cpu.base.Traps`); each method
returns the address to continue at.  This is the hot path of every guest: it keeps to locals and plain stores.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import MASK64, Hypercall
from pyxen.errors import GuestFault, XenError
from pyxen.hypervisor import trace
from pyxen.hypervisor.hypercall import Preempted, crash_on_bug
from pyxen.hypervisor.x86.pv import emulate, far, iret, ldt
from pyxen.hypervisor.x86.pv.descriptors import FLAT_RING3_CS32, FLAT_RING3_CS64
from pyxen.hypervisor.x86.pv.ptwr import ptwr_do_page_fault
from pyxen.machine.cpu.base import R8, R9, R10, R11, RAX, RBX, RCX, RDI, RDX, RSI

if TYPE_CHECKING:
    from pyxen.hypervisor.hypercall import Entry
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu

_IRET: Final = int(Hypercall.IRET)
_EFLAGS_DF: Final = 0x400
_PF_PRESENT: Final = 1
_PF_WRITE: Final = 2
_PF_USER: Final = 4
_PF_RESERVED: Final = 8
_ERROR_VECTORS: Final = frozenset((8, 10, 11, 12, 13, 14, 17))


class PvTraps:
    """The :class:`~pyxen.machine.cpu.base.Traps` of one PV vCPU."""

    def __init__(self, pv: PvVcpu, table: list[Entry | None]) -> None:
        self.pv = pv
        self.table = table
        self.counts = pv.domain.hypercall_counts
        self.trace = pv.hypervisor.trace
        self.xsm = pv.hypervisor.xsm
        self.exceptions = [0] * 32
        self.system_calls = 0
        self.page_table_writes = 0
        self.emulated = 0

    # --- SYSCALL ----------------------------------------------------------------------------------

    def syscall(self, next_rip: int) -> int:
        """Guest kernel: a hypercall. Guest user: a system call for its kernel."""
        pv = self.pv
        cpu = pv.cpu
        assert cpu is not None
        gpr = cpu.gpr
        try:
            if not pv.kernel_mode:
                self.system_calls += 1
                return self._system_call(next_rip)
            number = gpr[RAX]
            if self.trace.enabled:
                self.trace.event(trace.TRC_PV_HYPERCALL_V2, pv.vcpu, number)
            if number == _IRET:
                self.counts[_IRET] += 1
                next_rip = iret.do_iret(pv, cpu)
            else:
                try:
                    entry = self.table[number] if number < 64 else None
                    if entry is None:
                        result = -errno.ENOSYS
                        self.pv.hypervisor.note_enosys(pv.domain, number)
                    else:
                        self.counts[number] += 1
                        self.xsm.hypercall(pv.domain, number)
                        _name, handler, nr_args = entry
                        if nr_args == 4:
                            result = handler(pv, gpr[RDI], gpr[RSI], gpr[RDX], gpr[R10])
                        elif nr_args == 3:
                            result = handler(pv, gpr[RDI], gpr[RSI], gpr[RDX])
                        elif nr_args == 2:
                            result = handler(pv, gpr[RDI], gpr[RSI])
                        else:
                            arguments = (gpr[RDI], gpr[RSI], gpr[RDX], gpr[R10], gpr[R8], gpr[R9])
                            result = handler(pv, *arguments[:nr_args])
                except XenError as error:
                    result = -error.errno
                except Preempted as more:
                    pv.preempt_at = 0
                    return self._continue(number, more.arguments, next_rip)
                pv.preempt_at = 0
                gpr[RAX] = result & MASK64
                if pv.flush_wanted:
                    pv.flush_engine(cpu)
            at = pv.vcpu.info_maddr
            data = pv.bytes
            if data[at] and not data[at + 1]:
                return pv.deliver_event(next_rip)
        except Exception as error:  # the one dispatch point: see architecture.md, decision 3
            self._crash("a hypercall", error, next_rip)
        return next_rip

    def _continue(self, number: int, arguments: tuple[int, ...], next_rip: int) -> int:
        """hypercall_create_continuation: the guest executes its hypercall again, with what is left to do."""
        cpu = self.pv.cpu
        assert cpu is not None
        gpr = cpu.gpr
        for register, value in zip((RDI, RSI, RDX, R10, R8, R9), arguments, strict=False):
            gpr[register] = value & MASK64
        gpr[RAX] = number
        if self.pv.flush_wanted:
            self.pv.flush_engine(cpu)
        return self.pv.deliver_event(next_rip - 2 & MASK64)

    def _system_call(self, next_rip: int) -> int:
        pv = self.pv
        cpu = pv.cpu
        assert cpu is not None
        gpr = cpu.gpr
        flags = cpu.flags
        callback, cs = pv.syscall_callback, FLAT_RING3_CS64
        if (cs_now := cpu.selector(1)) not in pv.flat_code and not iret.is_flat(pv, cs_now):  # compatibility mode
            callback, cs = pv.syscall32_callback, FLAT_RING3_CS32
        if not callback:
            return pv.inject(6, None, next_rip - 2 & MASK64)
        gpr[RCX] = next_rip
        gpr[R11] = flags
        target = pv.bounce(callback, next_rip, flags, None, pv.syscall_masks_events, cs)
        if flags & _EFLAGS_DF:  # switch_to_kernel in entry.S; the kernel relies on it as on IA32_FMASK
            cpu.flags &= ~_EFLAGS_DF
        return target

    # --- exceptions --------------------------------------------------------------------------------

    def exception(self, vector: int, error_code: int | None, rip: int, software: bool) -> int:
        """A fault or software interrupt of the guest."""
        pv = self.pv
        try:
            if vector < 32:
                self.exceptions[vector] += 1
            if vector == 14:
                rip = self._page_fault(error_code or 0, rip)
            elif vector == 13 and not software:
                rip = self._general_protection(error_code or 0, rip)
            else:
                rip = self._other(vector, error_code, rip, software)
            if pv.flush_wanted and pv.cpu is not None:
                pv.flush_engine(pv.cpu)
            at = pv.vcpu.info_maddr
            data = pv.bytes
            if data[at] and not data[at + 1]:
                return pv.deliver_event(rip)
        except Exception as error:  # as in syscall()
            self._crash(f"exception {vector}", error, rip)
        return rip

    def _page_fault(self, error: int, rip: int) -> int:
        pv = self.pv
        cpu = pv.cpu
        assert cpu is not None
        va = cpu.cr2
        if self.trace.enabled:
            self.trace.event(trace.TRC_PV_PAGE_FAULT, pv.vcpu, rip, rip >> 32, va, va >> 32, error)
        if pv.kernel_mode:
            if not pv.exact and cpu.cpl() == 3:
                # Fast mode: the kernel went to CPL 3 by a transfer the engine did by itself. Its place is CPL 1; try
                # again there.
                pv.at_cpl1(cpu)
                return rip
            if error & (_PF_PRESENT | _PF_WRITE | _PF_RESERVED) == _PF_PRESENT | _PF_WRITE:
                resumed = ptwr_do_page_fault(pv.vcpu, cpu, va, rip)
                if resumed is not None:
                    self.page_table_writes += 1
                    return resumed
        if not error & (_PF_USER | _PF_PRESENT):
            elsewhere = ldt.handle_fault(pv, va)
            if elsewhere is not None:
                if not elsewhere:
                    return rip
                va = elsewhere
        return pv.inject_page_fault(va, error, rip)

    def _general_protection(self, error: int, rip: int) -> int:
        pv = self.pv
        cpu = pv.cpu
        assert cpu is not None
        if error & 3 == 2:  # INT n: the IDT has no gate for it, the guest's trap table may (DPL in its flags)
            vector = error >> 3 & 0xFF
            entry = pv.trap_table[vector]
            if entry is not None and entry[0] & 3 >= (1 if pv.kernel_mode else 3):
                return pv.bounce(entry[2], rip + 2 & MASK64, cpu.flags, None, bool(entry[0] & 4))
            return pv.inject(13, error, rip)
        if not error:
            resumed = emulate.privileged_op(pv, cpu, rip)
            if resumed is not None:
                self.emulated += 1
                return resumed
        if pv.kernel_mode and not pv.exact:
            resumed = far.emulate(pv, cpu, rip)
            if resumed is not None:
                return resumed
        return pv.inject(13, error, rip)

    def _other(self, vector: int, error: int | None, rip: int, software: bool) -> int:
        pv = self.pv
        cpu = pv.cpu
        assert cpu is not None
        if vector == 6:
            resumed = emulate.forced_op(pv, cpu, rip)
            if resumed is not None:
                self.emulated += 1
                return resumed
        elif vector == 1:
            pv.debugreg[6] = cpu.get_debug_register(6)
        elif vector == 7 and pv.cr0_ts:
            pv.cr0_ts = False
            cpu.set_task_switched(False)
        elif vector == 0x80 and pv.trap_table[0x80] is None:  # int80_slow_path: as if the gate were a kernel's
            return pv.inject(13, 0x80 << 3 | 2, rip - 2 & MASK64)
        elif vector == 8:
            raise GuestFault(f"double fault at rip {rip:#x}")
        return pv.inject(vector, error if vector in _ERROR_VECTORS and not software else None, rip)

    def pause(self, next_rip: int) -> int:
        """PAUSE while other vCPUs of the domain wait for this engine: it spins, perhaps for what one of them has."""
        pv = self.pv
        try:
            pv.hypervisor.scheduler.vcpu_pause_instruction(pv.vcpu)
        except Exception as error:
            self._crash("PAUSE", error, next_rip)
        return next_rip

    # --- CPUID -------------------------------------------------------------------------------------

    def cpuid(self, rip: int) -> int:
        """CPUID faults into the policy, as with CPUID faulting on real hardware."""
        pv = self.pv
        cpu = pv.cpu
        assert cpu is not None
        gpr = cpu.gpr
        gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX] = pv.domain.pv.cpuid.leaf(
            gpr[RAX] & 0xFFFFFFFF, gpr[RCX] & 0xFFFFFFFF, pv
        )
        return rip + 2

    def _crash(self, where: str, error: BaseException, rip: int) -> None:
        pv = self.pv
        crash_on_bug(pv.domain, f"{where} of {pv.vcpu}", error, rip)
        cpu = pv.cpu
        if cpu is not None:
            cpu.stop()


