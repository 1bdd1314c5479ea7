# SPDX-License-Identifier: GPL-2.0-only
"""Debug keys: ``xl debug-keys`` (Xen: xen/common/keyhandler.c). The output goes to the console ring, in Xen's
layout."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.domain import Domain, Dying
from pyxen.hypervisor.event_channel_op import dump_evtchn_info
from pyxen.hypervisor.grant_table import dump_grant_tables
from pyxen.hypervisor.vcpu import PauseFlag
from pyxen.machine.cpu.base import GPR_NAMES

if TYPE_CHECKING:
    from pyxen.hypervisor.hypervisor import Hypervisor


def _dump_domains(hypervisor: Hypervisor) -> None:
    printk = hypervisor.log.printk
    printk(f"'q' pressed -> dumping domain info (now = {hypervisor.clock.now_ns()})")
    for domain in sorted(hypervisor.domains.copy().values(), key=lambda d: d.domid):
        _dump_domain(hypervisor, domain)


def _dump_domain(hypervisor: Hypervisor, domain: Domain) -> None:
    printk = hypervisor.log.printk
    frames = hypervisor.frames
    heap = 0 if domain.is_privileged else 1
    printk(f"General information for domain {domain.domid}:")
    printk(f"    dying={int(domain.dying is not Dying.ALIVE)} pause_count={domain.pause_count}")
    printk(f"    nr_pages={domain.tot_pages} xenheap_pages={heap} max_pages={domain.max_pages}")
    printk(f"    handle={uuid.UUID(bytes=domain.handle)} vm_assist={domain.vm_assist:08x}")
    if domain.is_privileged:
        return
    printk(f"Memory pages belonging to domain {domain.domid}:")
    printk("    DomPage list too long to display")
    mfn = domain.shared_info_mfn
    printk(f"    XenPage {mfn:016x}: caf={frames.count_info[mfn]:016x}, taf={frames.type_info[mfn]:016x}")
    printk(f"VCPU information and callbacks for domain {domain.domid}:")
    memory = hypervisor.memory
    for vcpu in domain.vcpus:
        at = vcpu.info_maddr
        pending, masked = (memory.b[at], memory.b[at + 1]) if at else (0, 0)
        has = "T" if vcpu.is_running else "F"
        printk(f"    VCPU{vcpu.vcpu_id}: CPU{vcpu.processor} [has={has}] poll={vcpu.poll_port} "
               f"upcall_pend={pending:02x} upcall_mask={masked:02x}")
        printk(f"    pause_count={vcpu.pause_count} pause_flags={int(vcpu.pause_flags):x}")
        if vcpu.periodic_period_ns:
            printk(f"{vcpu.periodic_period_ns // 1_000_000} ms periodic timer")
        else:
            printk("No periodic timer")


def _dump_runqueues(hypervisor: Hypervisor) -> None:
    hypervisor.log.printk("'r' pressed -> dumping run queues")
    for line in hypervisor.scheduler.dump():
        hypervisor.log.printk(line)


def _dump_registers(hypervisor: Hypervisor) -> None:
    """What each running vCPU is at; read where it can be read, which is when its context is saved."""
    printk = hypervisor.log.printk
    printk("'d' pressed -> dumping registers")
    for domain in list(hypervisor.domains.values()):
        for vcpu in domain.vcpus:
            if vcpu.pause_flags & PauseFlag.DOWN or vcpu.context is None:
                continue
            hypervisor.scheduler.vcpu_pause(vcpu)
            try:
                registers = vcpu.context.get()
            finally:
                hypervisor.scheduler.vcpu_unpause(vcpu)
            printk(f"*** Dumping CPU{vcpu.processor} guest state ({vcpu!r}): ***")
            printk(f"RIP: {registers.gpr[16]:016x}  RFLAGS: {registers.flags:08x}  CR3: {registers.cr3:016x}")
            for i in range(0, 16, 4):
                printk("  ".join(f"{GPR_NAMES[j]}: {registers.gpr[j]:016x}" for j in range(i, i + 4)))


def _memory_info(hypervisor: Hypervisor) -> None:
    printk = hypervisor.log.printk
    printk("Physical memory information:")
    printk(f"    Domain heap: {hypervisor.allocator.free_frames * 4}kB free of {hypervisor.memory.nr_frames * 4}kB")


def _help(hypervisor: Hypervisor) -> None:
    printk = hypervisor.log.printk
    printk("'h' pressed -> showing installed handlers")
    for key in sorted(_KEYS):
        printk(f" key '{key}' (ascii '{ord(key):02x}') => {_KEYS[key][1]}")


_KEYS: Final[dict[str, tuple[Callable[[Hypervisor], None], str]]] = {
    "d": (_dump_registers, "dump registers"),
    "e": (dump_evtchn_info, "dump evtchn info"),
    "g": (dump_grant_tables, "print grant table usage"),
    "h": (_help, "show this message"),
    "m": (_memory_info, "memory info"),
    "q": (_dump_domains, "dump domain (and guest debug) info"),
    "r": (_dump_runqueues, "dump run queues"),
}


def handle(hypervisor: Hypervisor, key: str) -> None:
    """handle_keypress(): unknown keys are ignored, as Xen ignores them."""
    found = _KEYS.get(key)
    if found is not None:
        found[0](hypervisor)
