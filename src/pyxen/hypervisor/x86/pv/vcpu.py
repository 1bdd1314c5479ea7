# SPDX-License-Identifier: GPL-2.0-only
"""``struct pv_vcpu``: a PV vCPU's state, its view of memory, and how control enters its kernel.

Control enters the guest kernel by a *bounce frame* on its stack (create_bounce_frame in
xen/arch/x86/x86_64/entry.S), whatever the
reason: fault, software interrupt, system call, event.  Everything here runs on the thread of the engine that has the
vCPU
loaded, except guest access to a vCPU that is not running.

Guest memory is reached through the guest's own page tables with a small translation cache; it obeys the rules of a TLB:
it is dropped whenever the guest or the hypervisor flushes, and a frame that changes hands flushes first.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Final

from pyxen.abi.arch_x86 import HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from pyxen.abi.xen import MASK64
from pyxen.errors import GuestAccessError, GuestFault
from pyxen.hypervisor.x86.pv.descriptors import (
    FAST_KERNEL_CS,
    FAST_KERNEL_SS,
    FLAT_KERNEL_CS,
    FLAT_KERNEL_SS,
    FLAT_RING3_SS32,
    LAST_GDT_BYTE,
)
from pyxen.hypervisor.x86.pv.slots import gdt_va
from pyxen.hypervisor.x86.pv.walk import guest_walk
from pyxen.machine.cpu.base import R11, RCX, RSP, Seg

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.hypervisor.x86.pv.traps import PvTraps
    from pyxen.machine.cpu.base import Cpu

_FRAME: Final = struct.Struct("<7Q")
_FRAME_ERROR: Final = struct.Struct("<8Q")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_ident = threading.get_ident

EFLAGS_IF: Final = 0x200
EFLAGS_IOPL: Final = 0x3000
CLEARED_ON_ENTRY: Final = 0x100 | 0x4000 | 0x10000 | 0x20000  # TF, NT, RF, VM
CANONICAL_LOW: Final = 1 << 47
DEBUGREG_RESET: Final = (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400)

_CS: Final = int(Seg.CS)
_SS: Final = int(Seg.SS)
_CODE64: Final = 0xAFFB00
_DATA: Final = 0xCFF300


class PvVcpu:
    """PV part of a vCPU. It is also the *caller* of its hypercalls (see hypervisor.hypercall.Caller)."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu: Vcpu = vcpu
        self.domain: Domain = vcpu.domain
        hypervisor = vcpu.domain.hypervisor
        self.hypervisor = hypervisor
        self.memory = hypervisor.memory
        self.bytes = hypervisor.memory.b
        self.exact = vcpu.domain.pv.mode == "exact"
        self.cpu: Cpu | None = None
        self.flush_wanted = False
        self.fresh = False
        self.traps: PvTraps
        self.preempt_at = 0
        # Modes and roots
        self.kernel_mode = True
        self.guest_table = 0
        self.guest_table_user = 0
        self.root_loaded = 0
        # Entry points
        self.trap_table: list[tuple[int, int, int] | None] = [None] * 256
        self.event_callback = 0
        self.failsafe_callback = 0
        self.syscall_callback = 0
        self.syscall32_callback = 0
        self.sysenter_callback = 0
        self.nmi_masked = False
        """An NMI was delivered and the kernel has not returned from it (async_exception_mask)."""
        self.failsafe_masks_events = False
        self.syscall_masks_events = False
        self.sysenter_masks_events = False
        self.kernel_sp = 0
        self.kernel_ss = FLAT_KERNEL_SS
        # Registers that the engine does not hold
        self.gs_base_kernel = 0
        self.gs_base_user = 0
        self.iopl = 0
        self.iobmp = 0
        self.iobmp_limit = 0
        self.cr0_ts = False
        self.guest_cr4 = 0x620
        self.debugreg = list(DEBUGREG_RESET)
        # Descriptor tables
        self.gdt_frames: list[int] = []
        self.gdt_ents = 0
        self.ldt_base = 0
        self.ldt_ents = 0
        self.ldt_frames: dict[int, int] = {}
        self.kernel_cs, self.kernel_ss_now = (
            (FLAT_KERNEL_CS, FLAT_KERNEL_SS) if self.exact else (FAST_KERNEL_CS, FAST_KERNEL_SS)
        )
        self.flat_code: set[int] = {FLAT_KERNEL_CS, FAST_KERNEL_CS}
        """Code selectors known to name a flat 64-bit segment of DPL 3 in the current GDT."""
        self.user_segments: dict[tuple[int, int], tuple[int, int]] = {}
        self._read_cache: dict[int, int] = {}
        self._write_cache: dict[int, int] = {}

    @property
    def live_cpu(self) -> Cpu | None:
        """The engine whose registers are this vCPU's now. ``cpu`` alone is only where it ran last."""
        cpu = self.cpu
        return cpu if cpu is not None and cpu.loaded is self.vcpu.context else None

    # --- translation -------------------------------------------------------------------------

    def flush_tlb(self) -> None:
        """Forget every translation of this vCPU, here now and in the engine before the next guest instruction.

        One hypercall may ask for it several times (a type change, an entry, a root): the engine flushes once, on the
        way out.
        """
        self._read_cache.clear()
        self._write_cache.clear()
        cpu = self.cpu
        self.flush_wanted = True  # before its next instruction, whether it is loaded now or not
        if cpu is None or cpu.loaded is not self.vcpu.context:
            return
        if self.domain.evtchn.home_thread != _ident():
            # Whoever takes frames from a domain that runs elsewhere pauses it first, so that no instruction is between
            # here and there.
            cpu.kick()

    def flush_engine(self, cpu: Cpu) -> None:
        """Do what :meth:`flush_tlb` promised. On the engine's thread."""
        self.flush_wanted = False  # first: another thread may ask again meanwhile
        self._read_cache.clear()
        self._write_cache.clear()
        cpu.flush_tlb()

    def flush_tlb_page(self, va: int) -> None:
        """Forget the translation of one linear address."""
        self._read_cache.pop(va >> 12, None)
        self._write_cache.pop(va >> 12, None)
        cpu = self.cpu
        if cpu is None or cpu.loaded is not self.vcpu.context:
            self.flush_wanted = True
            return
        if self.domain.evtchn.home_thread != _ident():
            self.flush_wanted = True
            cpu.kick()
        elif not self.flush_wanted:
            cpu.flush_tlb_page(va)

    def new_cr3(self) -> None:
        """guest_table or guest_table_user changed: load the root of the current mode."""
        self._read_cache.clear()
        self._write_cache.clear()
        cpu = self.cpu
        if cpu is not None and cpu.loaded is self.vcpu.context:
            root = self.guest_table if self.kernel_mode or self._shares_root() else self.guest_table_user
            self.root_loaded = root
            self.flush_wanted = False  # before it: see flush_engine
            cpu.set_cr3(root << 12)

    def _shares_root(self) -> bool:
        """Fast mode: may user mode run on the kernel's root? Yes if the user half of both L4s is the same."""
        if self.exact:
            return False
        data = self.bytes
        kernel, user = self.guest_table << 12, self.guest_table_user << 12
        return bytes(data[kernel : kernel + 2048]) == bytes(data[user : user + 2048])

    def _page(self, va: int, write: bool) -> int:
        """Machine address of the page that holds ``va``, by the current mode's tables; fills the cache."""
        page = va >> 12
        if not CANONICAL_LOW <= va < HYPERVISOR_VIRT_END and va <= MASK64:
            table = self.guest_table if self.kernel_mode else self.guest_table_user
            found = guest_walk(self.memory, table, va, write)
            if found is not None:
                maddr = found & ~0xFFF
                if write:
                    self.hypervisor.frames.mark_dirty(maddr >> 12)
                if self.kernel_mode:
                    (self._write_cache if write else self._read_cache)[page] = maddr
                return maddr
        raise GuestAccessError(va)

    def read(self, address: int, size: int) -> bytes:
        """Copy from guest memory as a kernel access of the current mode. Raises GuestAccessError."""
        offset = address & 0xFFF
        if offset + size <= 4096:
            base = self._read_cache.get(address >> 12) if self.kernel_mode else None
            if base is None:
                base = self._page(address, False)
            at = base + offset
            return bytes(self.bytes[at : at + size])
        parts = []
        while size > 0:
            count = min(size, 4096 - (address & 0xFFF))
            parts.append(self.read(address, count))
            address += count
            size -= count
        return b"".join(parts)

    def read_as_kernel(self, address: int, size: int) -> bytes:
        """Like :meth:`read`, by the kernel's tables whatever mode the vCPU is in (Xen: TOGGLE_MODE())"""
        if self.kernel_mode:
            return self.read(address, size)
        self.kernel_mode = True
        try:
            return self.read(address, size)
        finally:
            self.kernel_mode = False

    def write(self, address: int, data: bytes) -> None:
        """Copy to guest memory. Raises GuestAccessError; bytes before the bad page are then written."""
        offset = address & 0xFFF
        size = len(data)
        if offset + size <= 4096:
            base = self._write_cache.get(address >> 12) if self.kernel_mode else None
            if base is None:
                base = self._page(address, True)
            at = base + offset
            self.bytes[at : at + size] = data
            return
        done = 0
        while done < size:
            count = min(size - done, 4096 - (address & 0xFFF))
            self.write(address, data[done : done + count])
            address += count
            done += count

    def read_u32(self, address: int) -> int:
        """A 32-bit word of guest memory."""
        return int(_U32.unpack(self.read(address, 4))[0])

    def read_u64(self, address: int) -> int:
        """A 64-bit word of guest memory."""
        return int(_U64.unpack(self.read(address, 8))[0])

    def write_u32(self, address: int, value: int) -> None:
        """Store a 32-bit word."""
        self.write(address, _U32.pack(value))

    def write_u64(self, address: int, value: int) -> None:
        """Store a 64-bit word."""
        self.write(address, _U64.pack(value))

    @staticmethod
    def guest_address_ok(address: int, size: int = 1) -> bool:
        """access_ok: the range is canonical and outside Xen's own part of the address space."""
        end = address + size
        return end <= CANONICAL_LOW or (address >= HYPERVISOR_VIRT_END and end <= MASK64 + 1)

    # --- modes -------------------------------------------------------------------------------

    def to_kernel(self, cpu: Cpu) -> None:
        """toggle_guest_mode(), user to kernel: SWAPGS, and the kernel's root."""
        self.gs_base_user = cpu.gs_base
        cpu.gs_base = self.gs_base_kernel
        self.kernel_mode = True
        root = self.guest_table
        if self.exact:
            cpu.switch_space(0, root << 12)
            return
        cpu.set_cpl(1)
        if self.root_loaded != root:
            self.root_loaded = root
            cpu.set_cr3(root << 12)

    def to_user(self, cpu: Cpu) -> None:
        """toggle_guest_mode(), kernel to user."""
        self.gs_base_kernel = cpu.gs_base
        cpu.gs_base = self.gs_base_user
        self.kernel_mode = False
        if self.exact:
            # Both spaces keep their translations, as with Xen's global user pages: a guest that changes an entry
            # flushes, and every flush, and every new root, reaches both.
            cpu.switch_space(1, self.guest_table_user << 12)
            return
        cpu.set_cpl(3)
        if not self._shares_root():
            self.root_loaded = self.guest_table_user
            cpu.set_cr3(self.guest_table_user << 12)

    def at_cpl1(self, cpu: Cpu) -> None:
        """Fast mode: the kernel's place, with selectors it can use there in place of the ABI's."""
        cpu.set_cpl(1)
        if cpu.selector(_CS) == FLAT_KERNEL_CS:
            cpu.set_selector(_CS, FAST_KERNEL_CS)
        if cpu.selector(_SS) == FLAT_KERNEL_SS:
            cpu.set_selector(_SS, FAST_KERNEL_SS)

    # --- entry into the guest kernel ------------------------------------------------------------

    def bounce(
        self, address: int, rip: int, flags: int, error: int | None, mask_events: bool, syscall_cs: int = 0
    ) -> int:
        """create_bounce_frame: build the frame and return the address to continue at.

        ``rip`` and ``flags`` are what the guest interrupted; raises GuestFault when its kernel stack cannot take the
        frame. The frame of a system call shows ``syscall_cs`` and the flat SS, whatever was loaded (lstar_enter).
        """
        cpu = self.cpu
        assert cpu is not None
        gpr = cpu.gpr
        sp = gpr[RSP]
        cs = cpu.selector(_CS)
        ss = FLAT_RING3_SS32 if syscall_cs else cpu.selector(_SS)
        if self.kernel_mode:
            stack = sp & ~0xF
            pushed_cs = cs & 0xFFFC
            if ss == FAST_KERNEL_SS:
                ss = FLAT_KERNEL_SS
        else:
            self.to_kernel(cpu)
            stack = self.kernel_sp & ~0xF
            pushed_cs = syscall_cs or cs
        if HYPERVISOR_VIRT_START <= stack < HYPERVISOR_VIRT_END + 64:
            raise GuestFault(f"guest kernel stack {stack:#x} lies in Xen's own address range")
        if not address:
            raise GuestFault(f"nothing registered to enter its kernel at (interrupted at rip {rip:#x})")
        data = self.bytes
        mask_at = self.vcpu.info_maddr + 1
        masked = data[mask_at]
        saved = (flags & ~(EFLAGS_IF | EFLAGS_IOPL)) | (0 if masked else EFLAGS_IF)
        if mask_events:
            data[mask_at] = 1
        pushed_cs |= (1 if masked else 0) << 32
        if error is None:
            stack -= 56
            frame = _FRAME.pack(gpr[RCX], gpr[R11], rip, pushed_cs, saved, sp, ss)
        else:
            stack -= 64
            frame = _FRAME_ERROR.pack(gpr[RCX], gpr[R11], error, rip, pushed_cs, saved, sp, ss)
        stack &= MASK64
        try:
            base = self._write_cache.get(stack >> 12)
            offset = stack & 0xFFF
            if base is None or offset > 4032:
                self.write(stack, frame)
            else:
                at = base + offset
                data[at : at + len(frame)] = frame
        except GuestAccessError as fault:
            raise GuestFault(f"guest kernel stack {stack:#x} is not writable (trap at rip {rip:#x})") from fault
        gpr[RSP] = stack
        if cs not in self.flat_code:  # compatibility mode: the hidden parts are of another kind
            cpu.load_segment(_CS, self.kernel_cs, 0, 0xFFFFFFFF, _CODE64)
            cpu.load_segment(_SS, self.kernel_ss_now, 0, 0xFFFFFFFF, _DATA)
            cpu.set_cpl(3 if self.exact else 1)
        else:
            if cs != self.kernel_cs:
                cpu.set_selector(_CS, self.kernel_cs)
            if ss != self.kernel_ss_now or syscall_cs:
                cpu.set_selector(_SS, self.kernel_ss_now)
        if flags & CLEARED_ON_ENTRY:
            cpu.flags = flags & ~CLEARED_ON_ENTRY
        return address

    def inject(self, vector: int, error: int | None, rip: int) -> int:
        """Deliver a trap through the guest's trap table (do_guest_trap)."""
        cpu = self.cpu
        assert cpu is not None
        entry = self.trap_table[vector]
        if entry is None:
            raise GuestFault(f"unhandled trap {vector} error {error or 0:#x} at rip {rip:#x}")
        flags, _cs, address = entry
        return self.bounce(address, rip, cpu.flags, error, bool(flags & 4))

    def inject_page_fault(self, va: int, error: int, rip: int) -> int:
        """Deliver #PF: CR2 goes to vcpu_info, the user bit says which guest mode faulted."""
        error = error & ~4 | (0 if self.kernel_mode else 4)
        self.memory.q[(self.vcpu.info_maddr + 16) >> 3] = va
        return self.inject(14, error, rip)

    def event_pending(self) -> bool:
        """An event is pending and not masked."""
        at = self.vcpu.info_maddr
        data = self.bytes
        return bool(data[at]) and not data[at + 1]

    def deliver_event(self, rip: int) -> int:
        """Enter the event callback if an event is pending and unmasked; returns where to continue."""
        at = self.vcpu.info_maddr
        data = self.bytes
        if data[at] and not data[at + 1]:
            cpu = self.cpu
            assert cpu is not None
            return self.bounce(self.event_callback, rip, cpu.flags, None, True)
        return rip

    def set_guest_context(self, data: bytes) -> None:
        """VCPUOP_initialise: struct vcpu_guest_context. XenError(EINVAL)."""
        from pyxen.hypervisor.x86.pv.context import set_guest_context

        set_guest_context(self, data)

    def get_guest_context(self) -> bytes:
        """XEN_DOMCTL_getvcpucontext. XenError(ENODATA)."""
        from pyxen.hypervisor.x86.pv.context import get_guest_context

        return get_guest_context(self)

    def upcall_deliverable(self) -> bool:
        """See :class:`~pyxen.hypervisor.arch.ArchVcpu`; ``info_maddr`` is set."""
        return self.event_pending()

    def copy_to_kernel(self, address: int, data: bytes) -> None:
        """Like :meth:`write`, by the kernel's tables. Raises GuestAccessError."""
        kernel_mode = self.kernel_mode
        self.kernel_mode = True
        try:
            self.write(address, data)
        finally:
            self.kernel_mode = kernel_mode

    def mode_name(self) -> str:
        """For the crash log."""
        return "kernel" if self.kernel_mode else "user"

    def counters(self) -> dict[str, int]:
        """See :class:`~pyxen.hypervisor.arch.ArchVcpu`."""
        traps = self.traps
        counts = {f"exception_{vector}": count for vector, count in enumerate(traps.exceptions) if count}
        for name in ("system_calls", "page_table_writes", "emulated"):
            counts[name] = getattr(traps, name)
        return counts

    def destroy(self) -> None:
        """Put the frames of GDT and LDT."""
        from pyxen.hypervisor.x86.pv import gdt, ldt

        gdt.destroy_gdt(self)
        ldt.invalidate(self)

    def before_entry(self, cpu: Cpu) -> None:
        """Last stop before the engine runs this vCPU: adopt the engine, apply posted events, deliver what is
        pending."""
        self.cpu = cpu
        if self.fresh:
            self._first_entry(cpu)
        if self.flush_wanted:
            self.flush_engine(cpu)
        if not (self.kernel_mode or self.exact):
            root = self.guest_table if self._shares_root() else self.guest_table_user
            if root != self.root_loaded:  # another vCPU changed one of this one's L4s meanwhile
                self.root_loaded = root
                cpu.set_cr3(root << 12)
        evtchn = self.domain.evtchn
        if evtchn.posted:
            evtchn.apply_posted()
        if self.vcpu.nmi_pending and not self.nmi_masked:
            self._deliver_nmi(cpu)
        at = self.vcpu.info_maddr
        data = self.bytes
        if data[at] and not data[at + 1]:
            cpu.gpr[16] = self.bounce(self.event_callback, cpu.gpr[16], cpu.flags, None, True)

    def _deliver_nmi(self, cpu: Cpu) -> None:
        """process_nmi in entry.S: vector 2 of the trap table; without a handler the NMI is lost."""
        self.vcpu.nmi_pending = False
        if self.trap_table[2] is not None:
            self.nmi_masked = True
            cpu.gpr[16] = self.inject(2, None, cpu.gpr[16])

    def _first_entry(self, cpu: Cpu) -> None:
        """The context was set from outside: give the engine what a Context does not carry (tables, hidden parts of
        segments)."""
        from pyxen.hypervisor.x86.pv import iret, ldt

        self.fresh = False
        cpu.set_gdt(gdt_va(self.vcpu.vcpu_id), LAST_GDT_BYTE)
        ldt.load(self)
        for load, seg in ((iret.load_code, _CS), (iret.load_stack, _SS)):
            try:
                load(self, cpu, cpu.selector(seg) | 3)
            except iret.SegmentFault:
                raise GuestFault(f"vCPU set up with selector {cpu.selector(seg):#x}, which cannot be loaded") from None
        if self.kernel_mode and not self.exact:
            self.at_cpl1(cpu)
        else:
            cpu.set_cpl(3)
        cpu.set_task_switched(self.cr0_ts)
        for number, value in enumerate(self.debugreg):
            if number not in (4, 5):
                cpu.set_debug_register(number, value)
