# SPDX-License-Identifier: GPL-2.0-only
"""The hypercall page: one 32-byte stub for each hypercall number (Xen: hypercall_page_initialise_ring3_kernel in
xen/arch/x86/x86_64/traps.c; the slots are those of xen/include/public/xen.h)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import PAGE_SIZE, Hypercall
from pyxen.errors import XenError
from pyxen.hypervisor.frames import PGT_WRITABLE

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain

STUB_SIZE: Final = 32
_PUSH_RCX: Final = b"\x51"
_PUSH_R11: Final = b"\x41\x53"
_PUSH_RAX: Final = b"\x50"
_MOV_EAX: Final = b"\xb8"
_SYSCALL: Final = b"\x0f\x05"
_VMMCALL: Final = b"\x0f\x01\xd9"
_UD2: Final = b"\x0f\x0b"
_POP_R11: Final = b"\x41\x5b"
_POP_RCX: Final = b"\x59"
_RET: Final = b"\xc3"
_INT3: Final = b"\xcc"


def page() -> bytes:
    """The page of a 64-bit PV guest. SYSCALL destroys RCX and R11, so each stub saves them; HYPERVISOR_iret does not
    return, and takes them and RAX from its frame."""
    stubs = []
    for number in range(PAGE_SIZE // STUB_SIZE):
        load = _MOV_EAX + number.to_bytes(4, "little")
        if number == Hypercall.IRET:
            code = _PUSH_RCX + _PUSH_R11 + _PUSH_RAX + load + _SYSCALL
        else:
            code = _PUSH_RCX + _PUSH_R11 + load + _SYSCALL + _POP_R11 + _POP_RCX + _RET
        stubs.append(code.ljust(STUB_SIZE, _INT3))
    return b"".join(stubs)


def hvm_page() -> bytes:
    """The page of a translated guest (hypercall_page_initialise of svm.c): for any mode; HYPERVISOR_iret is not for
    such guests."""
    stubs = []
    for number in range(PAGE_SIZE // STUB_SIZE):
        code = _UD2 if number == Hypercall.IRET else _MOV_EAX + number.to_bytes(4, "little") + _VMMCALL + _RET
        stubs.append(code.ljust(STUB_SIZE, _INT3))
    return b"".join(stubs)


def initialise_hvm(domain: Domain, mfn: int) -> None:
    """Fill a frame of a translated ``domain``. XenError(EACCES): not its frame, or not one that may be written."""
    _fill(domain, mfn, hvm_page())


def initialise(domain: Domain, mfn: int) -> None:
    """Fill a frame of ``domain``. XenError(EACCES): not its frame, or not one that may be written."""
    _fill(domain, mfn, page())


def _fill(domain: Domain, mfn: int, data: bytes) -> None:
    frames = domain.hypervisor.frames
    if not frames.get_page_and_type(mfn, domain, PGT_WRITABLE):
        raise XenError(errno.EACCES)
    frames.memory.write(mfn << 12, data)
    frames.memory.written(mfn)
    frames.mark_dirty(mfn)
    frames.put_page_and_type(mfn)
