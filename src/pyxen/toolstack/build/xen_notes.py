# SPDX-License-Identifier: GPL-2.0-only
"""What a kernel asks of Xen, decoded from its notes (Xen: xen/common/libelf/libelf-dominfo.c, ``elf_dom_parms``).

Notes in PT_NOTE segments count first, then notes in sections, then the string of the legacy ``__xen_guest`` section:
the first of the three that says anything is the only one used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyxen.abi.elfnote import LEGACY_NAMES, STRING_NOTES, XEN_NOTE_NAME, XenElfNote
from pyxen.abi.xen import MASK64, PAGE_SHIFT
from pyxen.errors import ImageError
from pyxen.toolstack.build.elf import Elf, Note

# xen/include/public/features.h: XENFEAT_*, by the names notes use.
FEATURES: Final = {
    "writable_page_tables": 0,
    "writable_descriptor_tables": 1,
    "auto_translated_physmap": 2,
    "supervisor_mode_kernel": 3,
    "pae_pgdir_above_4gb": 4,
    "mmu_pt_update_preserve_ad": 5,
    "highmem_assist": 6,
    "gnttab_map_avail_bits": 7,
    "hvm_callback_vector": 8,
    "hvm_safe_pvclock": 9,
    "hvm_pirqs": 10,
    "dom0": 11,
    "linux_rsdp_unrestricted": 15,
}
_REFUSED: Final = {
    "auto_translated_physmap": "it runs only where Xen translates its memory",
    "supervisor_mode_kernel": "it runs only in ring 0",
    "dom0": "it runs only as dom0",
}
"""Features that no PV guest has here (Xen: xc_dom_elfloader.c refuses dom0; no domU builder offers the other two)."""


@dataclass(frozen=True, slots=True)
class XenParms:
    """``struct elf_dom_parms``, checked: addresses are virtual, ``*_offset`` as in the note's own text."""

    virt_base: int
    paddr_offset: int
    entry: int
    virt_kstart: int
    virt_kend: int
    hypercall_page: int | None
    init_p2m: int | None
    mod_start_pfn: bool
    hv_start_low: int | None
    phys32_entry: int | None
    suspend_cancel: bool
    l1_mfn_valid: tuple[tuple[int, int], ...]
    """(mask, value) pairs."""
    guest_os: str
    guest_version: str
    xen_version: str
    loader: str
    pae_mode: str
    features_supported: int
    """Bits of XENFEAT_*; required ones are set here too."""
    features_required: int

    @property
    def virt_offset(self) -> int:
        """virtual address = ELF paddr + this."""
        return self.virt_base - self.paddr_offset


@dataclass(frozen=True, slots=True)
class PvhParms:
    """What of a kernel's notes matters when it starts without paging, by PHYS32_ENTRY."""

    entry: int
    """Guest-physical address, below 4 GiB."""
    guest_os: str
    features_supported: int
    """Bits of XENFEAT_*."""

    @property
    def finds_rsdp_anywhere(self) -> bool:
        """Whether the kernel takes the RSDP's address from start_info; Linux before 4.20 looks below 1 MiB only."""
        return self.guest_os != "linux" or bool(self.features_supported >> FEATURES["linux_rsdp_unrestricted"] & 1)


def pvh_parms(elf: Elf) -> PvhParms:
    """Decode and check for a PVH guest (elf_xen_note_check, elf_xen_addr_calc_check for ``hvm``): PHYS32_ENTRY is all
    that is needed, and addresses are the file's physical ones. Raises ImageError for a kernel that has no such entry.
    """
    notes, from_notes = _collect(elf)
    entry = notes.get(XenElfNote.PHYS32_ENTRY) if from_notes else None
    if not isinstance(entry, int):
        has_pv = XenElfNote.ENTRY in notes or (not from_notes and bool(notes))
        raise ImageError(
            "kernel cannot start as a PVH guest: it has no PHYS32_ENTRY note",
            hint='it has a PV entry: use type = "pv"'
            if has_pv
            else 'a Linux kernel needs CONFIG_PVH; one with CONFIG_XEN_PV starts with type = "pv"',
        )
    if not any(segment.paddr <= entry < segment.end for segment in elf.segments) or entry >= 1 << 32:
        raise ImageError(f"kernel's PHYS32_ENTRY {entry:#x} is outside of the kernel ({elf.start:#x} to {elf.end:#x})")
    features = notes.get(XenElfNote.FEATURES, "")
    required = features.split("|") if isinstance(features, str) else []
    if "!dom0" in required:
        raise ImageError(f"kernel requires the Xen feature dom0: {_REFUSED['dom0']}")
    supported = notes.get(XenElfNote.SUPPORTED_FEATURES, 0)
    bits = supported if isinstance(supported, int) else 0
    for name in required:
        bits |= 1 << FEATURES[name.lstrip("!")] if name.lstrip("!") in FEATURES else 0
    guest_os = notes.get(XenElfNote.GUEST_OS, "")
    return PvhParms(entry, guest_os if isinstance(guest_os, str) else "", bits)


def xen_parms(elf: Elf) -> XenParms:
    """Decode and check.

    Raises ImageError for a kernel that is not for Xen, or that asks for what a PV guest cannot have.
    """
    notes, from_notes = _collect(elf)
    if not notes and elf.xen_guest is None:
        raise ImageError("kernel is not for Xen: no Xen notes and no __xen_guest section",
                         hint="a Linux kernel needs CONFIG_XEN_PV")
    number = {kind: value for kind, value in notes.items() if isinstance(value, int)}
    text = {kind: value for kind, value in notes.items() if isinstance(value, str)}

    loader, guest_os = text.get(XenElfNote.LOADER, ""), text.get(XenElfNote.GUEST_OS, "")
    xen_version = text.get(XenElfNote.XEN_VERSION, "")
    if not loader.startswith("generic") and not guest_os.startswith("linux"):
        raise ImageError(f"kernel wants the {loader or 'unnamed'!r} loader; only generic ones and Linux can be loaded")
    if not xen_version.startswith("xen-3.0"):
        raise ImageError(f"kernel is built for {xen_version or 'an unnamed Xen version'}, not for xen-3.0")

    virt_base = number.get(XenElfNote.VIRT_BASE)
    paddr_offset = number.get(XenElfNote.PADDR_OFFSET)
    if virt_base is None:
        if paddr_offset is not None:
            raise ImageError("kernel's Xen notes give PADDR_OFFSET without VIRT_BASE")
        virt_base = 0
    if paddr_offset is None:
        paddr_offset = 0 if from_notes else virt_base
    offset = virt_base - paddr_offset
    kstart, kend = elf.start + offset, elf.end + offset
    if not _canonical(kstart, kend) or elf.start < paddr_offset:
        raise ImageError(f"kernel's Xen notes put it at an impossible address ({kstart:#x} to {kend:#x})")
    entry = number.get(XenElfNote.ENTRY, elf.entry + offset)
    if not kstart <= entry < kend:
        raise ImageError(f"kernel's entry point {entry:#x} is outside of the kernel ({kstart:#x} to {kend:#x})")

    hypercall_page = number.get(XenElfNote.HYPERCALL_PAGE)
    if hypercall_page is not None:
        if not from_notes:  # the legacy key is a page number, relative to the base
            hypercall_page = virt_base + (hypercall_page << PAGE_SHIFT)
        if hypercall_page & 0xFFF or not kstart <= hypercall_page or hypercall_page + 4096 > _page_up(kend):
            raise ImageError(f"kernel's hypercall page {hypercall_page:#x} is not a page of the kernel")
    init_p2m = number.get(XenElfNote.INIT_P2M)
    if init_p2m is not None and (init_p2m & 0x1FFFFF or not _canonical(init_p2m, init_p2m + 1)
                                 or kstart <= init_p2m < kend):
        raise ImageError(f"kernel's INIT_P2M address {init_p2m:#x} cannot hold its phys-to-machine list")
    supported, required = _features(text.get(XenElfNote.FEATURES, ""))
    return XenParms(
        virt_base=virt_base,
        paddr_offset=paddr_offset,
        entry=entry,
        virt_kstart=kstart,
        virt_kend=kend,
        hypercall_page=hypercall_page,
        init_p2m=init_p2m,
        mod_start_pfn=bool(number.get(XenElfNote.MOD_START_PFN, 0)),
        hv_start_low=number.get(XenElfNote.HV_START_LOW),
        phys32_entry=number.get(XenElfNote.PHYS32_ENTRY),
        suspend_cancel=bool(number.get(XenElfNote.SUSPEND_CANCEL, 0)),
        l1_mfn_valid=_mfn_valid(elf),
        guest_os=guest_os,
        guest_version=text.get(XenElfNote.GUEST_VERSION, ""),
        xen_version=xen_version,
        loader=loader,
        pae_mode=text.get(XenElfNote.PAE_MODE, ""),
        features_supported=supported | number.get(XenElfNote.SUPPORTED_FEATURES, 0),
        features_required=required,
    )


def _page_up(address: int) -> int:
    return address + 0xFFF & ~0xFFF


def _canonical(start: int, end: int) -> bool:
    """True when [start, end) lies within one half of the 48-bit address space, outside of Xen's hole."""
    if not 0 <= start < end <= MASK64:
        return False
    return end <= 1 << 47 or start >= 0xFFFF880000000000


def _xen_notes(notes: tuple[Note, ...]) -> list[Note]:
    return [note for note in notes if note.name == XEN_NOTE_NAME]


def _collect(elf: Elf) -> tuple[dict[XenElfNote, int | str], bool]:
    """-> (the values, whether they come from notes rather than from ``__xen_guest``). The last note of a type wins."""
    found: dict[XenElfNote, int | str] = {}
    for note in _xen_notes(elf.segment_notes) or _xen_notes(elf.section_notes):
        try:
            kind = XenElfNote(note.type)
        except ValueError:
            continue  # a later Xen's; libelf ignores it too
        if kind in STRING_NOTES:
            found[kind] = note.data.split(b"\0", 1)[0].decode("ascii", "replace")
        elif kind is XenElfNote.L1_MFN_VALID:
            continue
        elif len(note.data) in (4, 8):
            found[kind] = int.from_bytes(note.data, "little")
        elif kind is XenElfNote.MOD_START_PFN or kind is XenElfNote.SUSPEND_CANCEL:
            found[kind] = 0
        else:
            raise ImageError(f"kernel's Xen note {kind.name} has {len(note.data)} bytes, not 4 or 8")
    if found:
        return found, True
    for item in (elf.xen_guest or "").split(","):
        key, _, value = item.partition("=")
        legacy = LEGACY_NAMES.get(key.strip())
        if legacy is None:
            continue
        if legacy in STRING_NOTES:
            found[legacy] = value
        else:
            try:
                found[legacy] = int(value, 0) & MASK64
            except ValueError:
                raise ImageError(f"kernel's __xen_guest section has a bad number: {key.strip()}={value[:40]}") from None
    return found, False


def _mfn_valid(elf: Elf) -> tuple[tuple[int, int], ...]:
    pairs = []
    for note in _xen_notes(elf.segment_notes) or _xen_notes(elf.section_notes):
        if note.type == XenElfNote.L1_MFN_VALID and len(note.data) % 16 == 0:
            words = [int.from_bytes(note.data[i : i + 8], "little") for i in range(0, len(note.data), 8)]
            pairs += list(zip(words[::2], words[1::2], strict=True))
    return tuple(pairs)


def _features(text: str) -> tuple[int, int]:
    """Parse ``name|!name|…`` -> (supported, required). An unknown required feature is an error, as in libelf."""
    supported = required = 0
    for item in text.split("|"):
        name = item.lstrip("!").strip()
        if not name:
            continue
        bit = FEATURES.get(name)
        if not item.startswith("!"):
            supported |= 1 << bit if bit is not None else 0
            continue
        if bit is None:
            raise ImageError(f"kernel requires the unknown Xen feature {name[:40]!r}")
        if name in _REFUSED:
            raise ImageError(f"kernel requires the Xen feature {name}: {_REFUSED[name]}")
        supported |= 1 << bit
        required |= 1 << bit
    return supported, required
