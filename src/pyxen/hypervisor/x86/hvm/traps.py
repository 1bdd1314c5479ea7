# SPDX-License-Identifier: GPL-2.0-only
"""Where a translated guest leaves its own code (Xen: xen/arch/x86/hvm/svm/svm.c, svm_vmexit_handler; hvm.c).

One object per vCPU, called by the engine in place (:class:`pyxen.machine.cpu.base.HvmTraps`).  Nested faults come
through one method, :meth:`HvmTraps.nested_fault`, in Xen's order: hole or device, log-dirty, read-only memory; vm_event
and other views have their place before the last.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import MASK64, Hypercall
from pyxen.errors import GuestFault, XenError
from pyxen.hypervisor.hypercall import Preempted, crash_on_bug
from pyxen.hypervisor.x86.hvm import compat, cr, msr
from pyxen.hypervisor.x86.hvm.p2m_types import P2mType
from pyxen.machine.cpu.base import R8, R9, R10, RAX, RBX, RCX, RDI, RDX, RSI

if TYPE_CHECKING:
    from pyxen.hypervisor.hypercall import Entry
    from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu
    from pyxen.machine.cpu.base import HvmCpu

PF_WRITE: Final = 2
PF_FETCH: Final = 16
NPF_TABLE: Final = 1 << 33
"""NPF_PAGETABLE... of SVM's EXITINFO1: the walk of the guest's own tables, not the final access."""
VMCALL_LENGTH: Final = 3
_EXCEPTIONS: Final = ("exception", "cpuid", "hypercall", "nested_fault", "io", "mmio", "msr", "cr", "halt", "pause",
                      "window", "interrupt", "intercept")


class HvmTraps:
    """The handlers of one vCPU. :attr:`counts` counts calls by kind."""

    def __init__(self, hvm: HvmVcpu, table: list[Entry | None]) -> None:
        self.hvm = hvm
        self.table = table
        self.calls = hvm.domain.hypercall_counts
        self.xsm = hvm.hypervisor.xsm
        self.counts = dict.fromkeys(_EXCEPTIONS, 0)

    def _cpu(self) -> HvmCpu:
        cpu = self.hvm.cpu
        assert cpu is not None
        return cpu

    def _leave(self) -> None:
        """On the way back into the guest: flushes and posted events."""
        hvm = self.hvm
        if hvm.flush_wanted:
            hvm.flush_engine(self._cpu())
        if hvm.domain.evtchn.posted:
            hvm.domain.evtchn.apply_posted()
        if hvm.window or hvm.something_pending():
            hvm.update_window()

    def _crash(self, what: str, error: BaseException, rip: int | None) -> None:
        crash_on_bug(self.hvm.domain, f"{what} of {self.hvm.vcpu}", error, rip)
        self._cpu().stop()

    # --- hypercalls ----------------------------------------------------------------------------------

    def hypercall(self, next_rip: int) -> int:
        """hvm_hypercall(): in 64-bit mode the arguments are in RDI, RSI, RDX, R10, R8, R9; else see compat.py."""
        self.counts["hypercall"] += 1
        hvm = self.hvm
        cpu = self._cpu()
        gpr = cpu.gpr
        try:
            mode = cpu.code_bytes()
            if mode != 0 and cpu.cpl():
                gpr[RAX] = -errno.EPERM & MASK64
                return next_rip
            if mode != 8:
                again = compat.hypercall(hvm, cpu, self.table)
                self._leave()
                return next_rip - VMCALL_LENGTH & 0xFFFFFFFF if again else next_rip
            number = gpr[RAX]
            arguments = (gpr[RDI], gpr[RSI], gpr[RDX], gpr[R10], gpr[R8], gpr[R9])
            try:
                entry = self.table[number] if number < 64 else None
                if entry is None:
                    result = -errno.ENOSYS
                    hvm.hypervisor.note_enosys(hvm.domain, number)
                else:
                    self.calls[number] += 1
                    self.xsm.hypercall(hvm.domain, number)
                    result = entry.handler(hvm, *arguments[: entry.nr_args])
            except XenError as error:
                result = -error.errno
            except Preempted as more:
                for register, value in zip((RDI, RSI, RDX, R10, R8, R9), more.arguments, strict=False):
                    gpr[register] = value & MASK64
                hvm.preempt_at = 0
                self._leave()
                return next_rip - VMCALL_LENGTH & MASK64
            hvm.preempt_at = 0
            gpr[RAX] = result & MASK64
            self._leave()
        except Exception as error:  # the one place where a bug of ours is turned into one domain's crash
            name = gpr[RAX]
            self._crash(f"hypercall {Hypercall(name).name if name in Hypercall._value2member_map_ else name}", error,
                        next_rip)
        return next_rip

    # --- memory --------------------------------------------------------------------------------------

    def nested_fault(self, gpa: int, error_code: int, rip: int) -> int:
        """hvm_hap_nested_page_fault()."""
        self.counts["nested_fault"] += 1
        try:
            self._nested_fault(gpa, error_code)
            self._leave()
        except Exception as error:
            self._crash("nested fault", error, rip)
        return rip

    def _nested_fault(self, gpa: int, error_code: int) -> None:
        hvm = self.hvm
        gfn = gpa >> 12
        p2m = hvm.p2m
        _mfn, kind, _order = p2m.get_entry(gfn)
        where = "page tables" if error_code & NPF_TABLE else "memory"
        if kind in (P2mType.INVALID, P2mType.MMIO_DM, P2mType.MMIO_DIRECT):
            if error_code & NPF_TABLE:
                raise GuestFault(f"page tables at guest-physical address {gpa:#x}, where no memory is")
            if error_code & PF_FETCH:
                raise GuestFault(f"executes guest-physical address {gpa:#x}, where no memory is")
            if kind is P2mType.INVALID and p2m.map_hole(gfn):
                return
            raise GuestFault(f"access to guest-physical address {gpa:#x}, which has no memory")
        if error_code & PF_WRITE:
            if kind is P2mType.RAM_LOGDIRTY:
                log = hvm.domain.log_dirty
                if log is not None:
                    log.mark(gfn)
                    log.fault_count += 1
                if p2m.unprotect(gfn):
                    return
                kind = p2m.get_entry(gfn)[1]
            if kind in (P2mType.RAM_RO, P2mType.GRANT_MAP_RO):
                # Xen's emulator drops the write of ram_ro; for a read-only grant it injects #GP.
                if kind is P2mType.GRANT_MAP_RO or error_code & NPF_TABLE:
                    raise GuestFault(f"write to read-only {where} at guest-physical address {gpa:#x}")
                self._cpu().inject_exception(13, 0)
                return
        if kind is P2mType.RAM_RW or not error_code & PF_WRITE:
            # Allowed by the tables now: another vCPU's fault was first.
            if not self._progress(gfn, error_code):
                raise GuestFault(f"nested fault {error_code:#x} at {gpa:#x} of type {kind.name} does not go away")
            hvm.flush_wanted = True
            return
        raise GuestFault(f"nested fault {error_code:#x} at {gpa:#x} of type {kind.name}")

    _last: tuple[int, int] = (-1, 0)
    _repeats = 0

    def _progress(self, gfn: int, error_code: int) -> bool:
        """False for the same fault again and again, which would keep the host busy for nothing."""
        if self._last == (gfn, error_code):
            self._repeats += 1
        else:
            self._last, self._repeats = (gfn, error_code), 0
        return self._repeats < 1000

    def mmio_read(self, offset: int, size: int) -> int:
        """The window's pages are LAPIC_PAGE and NULL_PAGE of domain.py."""
        self.counts["mmio"] += 1
        if offset >> 12 == 0:
            return self.hvm.vlapic.mmio_read(offset, size)
        return (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """As above."""
        self.counts["mmio"] += 1
        if offset >> 12 == 0:
            try:
                self.hvm.vlapic.mmio_write(offset, size, value)
            except Exception as error:
                self._crash("local APIC access", error, None)

    # --- instructions --------------------------------------------------------------------------------

    def io_read(self, port: int, size: int) -> int:
        """See io.py."""
        self.counts["io"] += 1
        return self.hvm.domain.hvm.io.read(port, size)

    def io_write(self, port: int, size: int, value: int) -> None:
        """See io.py."""
        self.counts["io"] += 1
        self.hvm.domain.hvm.io.write(port, size, value)

    def read_msr(self, number: int) -> int | None:
        """See msr.py."""
        self.counts["msr"] += 1
        return msr.read(self.hvm, self._cpu(), number)

    def write_msr(self, number: int, value: int) -> bool:
        """See msr.py."""
        self.counts["msr"] += 1
        done = msr.write(self.hvm, self._cpu(), number, value)
        self._leave()
        return done

    def write_cr(self, number: int, value: int) -> bool:
        """See cr.py."""
        self.counts["cr"] += 1
        return cr.write(self.hvm, self._cpu(), number, value)

    def cpuid(self, rip: int) -> int:
        """See cpuid.py."""
        self.counts["cpuid"] += 1
        hvm = self.hvm
        cpu = self._cpu()
        gpr = cpu.gpr
        leaf, subleaf = gpr[RAX] & 0xFFFFFFFF, gpr[RCX] & 0xFFFFFFFF
        gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX] = hvm.domain.hvm.cpuid.hvm_leaf(leaf, subleaf, hvm)
        return rip + 2

    def halt(self, next_rip: int) -> int:
        """hvm_hlt()."""
        self.counts["halt"] += 1
        try:
            self.hvm.halt(self._cpu().flags)
            self._leave()
        except Exception as error:
            self._crash("HLT", error, next_rip)
        return next_rip

    def pause(self, next_rip: int) -> int:
        """A loop that waits: let another vCPU of the domain run, if one waits for this engine."""
        self.counts["pause"] += 1
        self.hvm.hypervisor.scheduler.vcpu_pause_instruction(self.hvm.vcpu)
        return next_rip

    def interrupt_window(self, rip: int) -> int:
        """hvm_intr_assist(): deliver what has priority now, and ask again if more waits."""
        self.counts["window"] += 1
        hvm = self.hvm
        try:
            if hvm.domain.evtchn.posted:
                hvm.domain.evtchn.apply_posted()
            hvm.deliver_interrupt(self._cpu())
            hvm.update_window()
        except Exception as error:
            self._crash("interrupt window", error, rip)
        return rip

    def triple_fault(self, rip: int) -> int:
        """hvm_triple_fault()."""
        self.hvm.triple_fault()
        self._cpu().stop()
        return rip

    def intercept(self, code: int, info: int, rip: int) -> int:
        """SVM's instructions, MONITOR, MWAIT …: not there."""
        self.counts["intercept"] += 1
        self._cpu().inject_exception(6, None)
        return rip

    def exception(self, vector: int, error_code: int | None, rip: int, software: bool) -> int:
        """Only what is intercepted comes here, and nothing is: give it to the guest."""
        self.counts["exception"] += 1
        self._cpu().inject_exception(vector, error_code)
        return rip

    def syscall(self, next_rip: int) -> int:
        """Never called: SYSCALL works natively."""
        raise GuestFault(f"SYSCALL before {next_rip:#x} left a guest under nested paging")
