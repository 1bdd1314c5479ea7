# SPDX-License-Identifier: GPL-2.0-only
"""``struct hvm_vcpu``: a translated domain's vCPU, its view of memory, and what interrupts it next (Xen:
xen/arch/x86/hvm/hvm.c, irq.c).

Interrupts are given at entry, to a guest that can take one, and else by *windows*: as long as something could be
delivered the engine is asked to say when the guest can take it (``request_interrupt_window``), and only then it is
decided what is delivered. Everything that changes the
answer (an event, an IRR bit, the TPR, an EOI) calls :meth:`HvmVcpu.update_window`. All of it runs on the thread of
the domain's engine; others change a flag and kick.

Guest memory is reached through the guest's own tables and the p2m, as a supervisor's access whatever the CPL
(Xen: hvm_copy_to_guest_linear without PFEC_user_mode).
"""

from __future__ import annotations

import errno
import struct
import threading
from typing import TYPE_CHECKING, Final

from pyxen.abi.hvm.params import HvmParam
from pyxen.abi.xen import VI_UPCALL_PENDING
from pyxen.errors import GuestAccessError, XenError
from pyxen.hypervisor.domain import ShutdownCode
from pyxen.hypervisor.vcpu import PauseFlag
from pyxen.hypervisor.x86.hvm.guest_walk import (
    CR4_SMAP,
    EFLAGS_AC,
    PFEC_WRITE,
    PageFault,
    PagingState,
    Translation,
    translate,
)
from pyxen.hypervisor.x86.hvm.msr import MsrState
from pyxen.hypervisor.x86.hvm.p2m_types import BACKED, P2mType
from pyxen.hypervisor.x86.hvm.vlapic import Vlapic

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.hypervisor.x86.hvm.p2m import P2m
    from pyxen.hypervisor.x86.hvm.traps import HvmTraps
    from pyxen.machine.cpu.base import Cpu, HvmContext, HvmCpu, HvmRegisters

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_ident = threading.get_ident
EFLAGS_IF: Final = 0x200
EFLAGS_VM: Final = 0x20000
_FRAMES_CACHED: Final = 1024
_WALKS_CACHED: Final = 256


class HvmVcpu:
    """See :class:`~pyxen.hypervisor.arch.ArchVcpu`."""

    def __init__(self, vcpu: Vcpu, p2m: P2m) -> None:
        self.vcpu: Vcpu = vcpu
        self.domain: Domain = vcpu.domain
        hypervisor = vcpu.domain.hypervisor
        self.hypervisor = hypervisor
        self.memory = hypervisor.memory
        self.bytes = hypervisor.memory.b
        self._q = hypervisor.memory.q
        self.p2m = p2m
        """The map it runs under: the host p2m (an altp2m view, one day)."""
        self.cpu: HvmCpu | None = None
        self.preempt_at = 0
        self.flush_wanted = False
        self.traps: HvmTraps
        self.vlapic = Vlapic(self)
        self.msr = MsrState()
        self.upcall_vector = 0
        """HVMOP_set_evtchn_upcall_vector: events arrive through the local APIC with this vector."""
        self.window = False
        """Whether an interrupt window is asked for, in the engine or (unloaded) in the context."""
        self._frames: dict[int, int] = {}
        self._changes = -1
        self._walks: dict[int, Translation] = {}
        """Translations by page and kind of access, each checked against the guest's tables before it is used."""
        self._walks_changes = -1

    # --- engine --------------------------------------------------------------------------------------

    @property
    def live_cpu(self) -> HvmCpu | None:
        """The engine whose registers are this vCPU's now."""
        cpu = self.cpu
        return cpu if cpu is not None and cpu.loaded is self.vcpu.context else None

    def context(self) -> HvmContext:
        """Its context. XenError(ENODATA) before it is set up."""
        context = self.vcpu.context
        if context is None:
            raise XenError(errno.ENODATA)
        return context  # type: ignore[return-value]  # a vCPU of this kind has no other

    def registers(self) -> HvmRegisters:
        """All registers of a vCPU that does not execute and whose context is saved. XenError(ENODATA)."""
        return self.context().get_hvm()

    def before_entry(self, cpu: Cpu) -> None:
        """Adopt the engine, flush, apply posted events, ask for a window if there is something to deliver."""
        self.cpu = cpu  # type: ignore[assignment]  # domains of this kind exist only where engines can run them
        hvm_cpu = self.cpu
        assert hvm_cpu is not None
        if self.flush_wanted:
            self.flush_engine(hvm_cpu)
        evtchn = self.domain.evtchn
        if evtchn.posted:
            evtchn.apply_posted()
        self.vlapic.run_posted()
        if self.vcpu.nmi_pending:
            self.vcpu.nmi_pending = False
            hvm_cpu.inject_nmi()
        if self.window or self.something_pending():
            if hvm_cpu.interruptible():
                # What the window would lead to, without leaving the guest once more: a vCPU that wakes from HLT.
                self.deliver_interrupt(hvm_cpu)
            self.update_window()

    def flush_tlb(self) -> None:
        """Forget every translation, here now and in the engine before the next guest instruction."""
        cpu = self.cpu
        self.flush_wanted = True  # before its next instruction, whether it is loaded now or not
        if cpu is None or cpu.loaded is not self.vcpu.context:
            return
        if self.domain.evtchn.home_thread != _ident():
            cpu.kick()

    def flush_engine(self, cpu: HvmCpu) -> None:
        """Do what :meth:`flush_tlb` promised. On the engine's thread."""
        self.flush_wanted = False
        cpu.flush_tlb()

    # --- interrupts ----------------------------------------------------------------------------------

    def something_pending(self) -> bool:
        """False: there is no interrupt to deliver, whatever the guest's state. At most exits and entries it is so."""
        at = self.vcpu.info_maddr
        return bool(self.vlapic.irr or (at and self.bytes[at + VI_UPCALL_PENDING]))

    def upcall_pending(self) -> bool:
        """Whether the domain's callback vector is to be delivered: its vcpu_info says so (the mask byte does not
        count here, IF does)."""
        at = self.vcpu.info_maddr
        return bool(at and self.domain.hvm.callback_vector and self.bytes[at + VI_UPCALL_PENDING])

    def pending_vector(self) -> int:
        """hvm_vcpu_has_pending_irq(): the vector to deliver next, -1 for none. NMIs have another way."""
        if self.upcall_pending():
            return self.domain.hvm.callback_vector
        return self.vlapic.has_pending_irq()

    def update_window(self) -> None:
        """Ask for, or call off, the interrupt window. On the engine's thread, with the vCPU loaded."""
        wanted = self.pending_vector() >= 0
        if wanted != self.window:
            cpu = self.live_cpu
            if cpu is not None:
                self.window = wanted
                cpu.request_interrupt_window(wanted)

    def take_interrupt(self) -> int:
        """hvm_vcpu_ack_pending_irq(): the vector that is delivered now, -1 for none any more."""
        if self.upcall_pending():
            return self.domain.hvm.callback_vector
        vector = self.vlapic.has_pending_irq()
        if vector >= 0:
            self.vlapic.ack_pending_irq(vector)
        return vector

    def deliver_interrupt(self, cpu: HvmCpu) -> None:
        """hvm_intr_assist(): the guest, which can, takes what has priority now, if anything has."""
        vector = self.take_interrupt()
        if vector >= 0:
            self.traps.counts["interrupt"] += 1
            cpu.inject_interrupt(vector)

    def event_state_changed(self) -> None:
        """Something to deliver came up, or went: vcpu_kick()."""
        self.hypervisor.scheduler.vcpu_unblock(self.vcpu)
        cpu = self.live_cpu
        if cpu is None:
            return
        if self.domain.evtchn.home_thread == _ident():
            self.update_window()
        else:
            cpu.kick()

    def assert_evtchn_irq(self) -> None:
        """hvm_assert_evtchn_irq(): evtchn_upcall_pending was set. On the thread of the domain's engine.

        A local APIC that is not enabled accepts nothing; it comes back here when it is (:meth:`apic_enabled`). Xen
        sets IRR at once, and Linux then complains of a stale interrupt on each CPU that it starts.
        """
        if self.upcall_vector:
            if self.vlapic.enabled:
                self.vlapic.set_irq(self.upcall_vector)
        else:
            self.event_state_changed()

    def apic_enabled(self) -> None:
        """The local APIC was just enabled by software: an event may have waited for it."""
        at = self.vcpu.info_maddr
        if at and self.upcall_vector and self.bytes[at + VI_UPCALL_PENDING]:
            self.vlapic.set_irq(self.upcall_vector)

    def upcall_deliverable(self) -> bool:
        """hvm_local_events_need_delivery(): something is pending, and RFLAGS.IF lets it in."""
        if self.vcpu.nmi_pending:
            return True
        if self.domain.evtchn.home_thread == _ident():
            self.vlapic.run_posted()
        return self.something_pending() and self.pending_vector() >= 0 and bool(self._flags() & EFLAGS_IF)

    def _flags(self) -> int:
        cpu = self.live_cpu
        if cpu is not None:
            return cpu.flags
        return self.context().saved_flags() if self.vcpu.context is not None else 0

    def halt(self, flags: int) -> None:
        """hvm_hlt(): wait for an interrupt; with interrupts off it is the guest's way of switching a vCPU off."""
        if not flags & EFLAGS_IF and not self.vcpu.nmi_pending:
            self.down()
        else:
            self.hypervisor.scheduler.vcpu_block(self.vcpu)

    def down(self) -> None:
        """hvm_vcpu_down(): the last vCPU that goes down powers the domain off."""
        domain, scheduler = self.domain, self.hypervisor.scheduler
        down = PauseFlag.DOWN
        with domain.lock:
            last = all(v is self.vcpu or v.pause_flags & down for v in domain.vcpus)
            if not last:
                scheduler.vcpu_down(self.vcpu)
        if last:
            scheduler.domain_shutdown(domain, ShutdownCode.POWEROFF)

    def triple_fault(self) -> None:
        """hvm_triple_fault(): the toolstack says what becomes of such a domain (reboot, by default)."""
        reason = self.domain.hvm.params[HvmParam.TRIPLE_FAULT_REASON]
        self.hypervisor.log.printk(f"{self.vcpu} Triple fault - invoking HVM shutdown action {reason or 1}")
        self.hypervisor.scheduler.domain_shutdown(self.domain, reason or ShutdownCode.REBOOT)

    # --- guest memory --------------------------------------------------------------------------------

    def guest_bytes(self) -> int:
        """hvm_guest_x86_mode(): 8, 4 or 2 by the code segment; 1 for virtual-8086 mode, 0 for real mode."""
        cpu = self.live_cpu
        if cpu is not None:
            return cpu.code_bytes()
        registers = self.registers()
        cr0, efer, flags = registers.cr0, registers.efer, registers.flags
        attributes = registers.segments[1].attributes
        if not cr0 & 1:
            return 0
        if flags & EFLAGS_VM:
            return 1
        if efer & 0x400 and attributes & 0x2000:
            return 8
        return 4 if attributes & 0x4000 else 2

    def _to_mfn(self, gfn: int) -> int | None:
        p2m = self.p2m
        frames = self._frames
        if self._changes != p2m.changes or len(frames) > _FRAMES_CACHED:
            frames.clear()
            self._changes = p2m.changes
        mfn = frames.get(gfn)
        if mfn is None:
            mfn = p2m.gfn_to_mfn(gfn)
            if mfn is not None:
                frames[gfn] = mfn
        return mfn

    def _page(self, address: int, write: bool) -> tuple[int, int]:
        """(machine address of ``address``, its guest frame); machine address -1 where a write is to be dropped."""
        changes = self.p2m.changes
        cpu, context = self.cpu, self.vcpu.context
        # Each switch of vCPUs comes here twice, for the runstate areas.
        if cpu is not None and cpu.loaded is context:
            paging = cpu.paging()
        elif context is not None:
            paging = self.context().paging()
        else:
            raise GuestAccessError(address)
        key = address >> 12 << 1 | write
        found = self._walks.get(key)
        if found is not None and self._walks_changes == changes and found.paging == paging:
            q = self._q
            for at, entry in found.path:
                if q[at] != entry:
                    break
            else:
                return found.maddr | address & 0xFFF, found.gfn
        path: list[tuple[int, int]] = []
        # What does without RFLAGS.AC does with it, too: only the former is kept.
        state = PagingState(*paging, 0)
        pfec = PFEC_WRITE if write else 0
        try:
            gpa = translate(self.memory, self._to_mfn, state, address, pfec, path)
        except PageFault:
            if not paging[2] & CR4_SMAP or not self._flags() & EFLAGS_AC:
                raise GuestAccessError(address) from None
            path.clear()
            try:
                gpa = translate(self.memory, self._to_mfn, state._replace(flags=EFLAGS_AC), address, pfec)
            except PageFault:
                raise GuestAccessError(address) from None
        gfn = gpa >> 12
        if write:
            mfn, kind, _ = self.p2m.get_entry(gfn)
            if kind not in BACKED:
                raise GuestAccessError(address)
            if kind in (P2mType.RAM_RO, P2mType.GRANT_MAP_RO):
                return -1, gfn  # p2m_is_discard_write
        else:
            backed = self._to_mfn(gfn)
            if backed is None:
                raise GuestAccessError(address)
            mfn = backed
        if path:
            if self._walks_changes != changes or len(self._walks) >= _WALKS_CACHED:
                self._walks.clear()
                self._walks_changes = changes
            self._walks[key] = Translation(paging, mfn << 12, gfn, tuple(path))
        return mfn << 12 | gpa & 0xFFF, gfn

    def read(self, address: int, size: int) -> bytes:
        """hvm_copy_from_guest_linear(). Raises GuestAccessError."""
        if (address & 0xFFF) + size <= 4096:
            maddr, _ = self._page(address, False)
            return bytes(self.bytes[maddr : maddr + size])
        parts = []
        while size > 0:
            count = min(size, 4096 - (address & 0xFFF))
            maddr, _ = self._page(address, False)
            parts.append(bytes(self.bytes[maddr : maddr + count]))
            address += count
            size -= count
        return b"".join(parts)

    read_as_kernel = read

    def write(self, address: int, data: bytes) -> None:
        """hvm_copy_to_guest_linear(). Raises GuestAccessError; bytes before the bad page are then written. A page that
        is read-only in the p2m swallows them."""
        log = self.domain.log_dirty
        while data:
            count = 4096 - (address & 0xFFF)
            part, data = (data, b"") if len(data) <= count else (data[:count], data[count:])
            maddr, gfn = self._page(address, True)
            if maddr >= 0:
                self.bytes[maddr : maddr + len(part)] = part
                if log is not None:
                    log.mark(gfn)
            address += count

    copy_to_kernel = write

    def read_u32(self, address: int) -> int:
        """A 32-bit word of guest memory."""
        return int(_U32.unpack(self.read(address, 4))[0])

    def read_u64(self, address: int) -> int:
        """A 64-bit word of guest memory."""
        return int(_U64.unpack(self.read(address, 8))[0])

    def write_u32(self, address: int, value: int) -> None:
        """Store a 32-bit word."""
        self.write(address, _U32.pack(value & 0xFFFFFFFF))

    def write_u64(self, address: int, value: int) -> None:
        """Store a 64-bit word."""
        self.write(address, _U64.pack(value & (1 << 64) - 1))

    # --- the rest of ArchVcpu ------------------------------------------------------------------------

    def set_guest_context(self, data: bytes) -> None:
        """arch_set_info_guest() has nothing for such a guest: XenError(EINVAL). Its registers are set by
        VCPUOP_initialise's struct vcpu_hvm_context, or XEN_DOMCTL_sethvmcontext."""
        raise XenError(errno.EINVAL)

    def get_guest_context(self) -> bytes:
        """arch_get_info_guest(). XenError(ENODATA)."""
        from pyxen.hypervisor.x86.hvm.context import guest_context

        return guest_context(self.registers())

    def mode_name(self) -> str:
        """By the privilege level."""
        cpu = self.live_cpu
        return "user" if cpu is not None and cpu.cpl() == 3 else "kernel"

    def counters(self) -> dict[str, int]:
        """Exits, by reason."""
        return {name: count for name, count in self.traps.counts.items() if count}

    def destroy(self) -> None:
        """Its timer runs no more."""
        self.vlapic.destroy()
