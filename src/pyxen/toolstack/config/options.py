# SPDX-License-Identifier: GPL-2.0-only
"""Every option of xl.cfg(5), 4.6 to 4.17, and what this version of pyxen does with it.

xl itself reads only the options it knows and says nothing of others; a misspelt one is then lost without a word.
Here an unknown option gets a warning, and a known one that would have an effect on a real host, but not yet here, is
refused when the domain is created (reading a file never refuses it).
"""

from __future__ import annotations

from enum import Enum, auto

from pyxen.toolstack.config.syntax import Value


class Handling(Enum):
    """What becomes of an option."""

    TYPED = auto()
    """Read into DomainConfig."""
    INERT = auto()
    """Accepted: it changes nothing that a guest or a person could see here."""
    HVM_ONLY = auto()
    """Ignored for PV and PVH domains, as xl does; refused for HVM."""
    TRANSLATED = auto()
    """Ignored for a PV domain, as xl does; refused for others when it asks for what does not happen anyway."""
    LATER = auto()
    """Refused at create time when it asks for something (an empty list, an empty string and 0 do not)."""


_TYPED = """
    name type builder uuid memory maxmem vcpus maxvcpus cpus cpus_soft cpu_weight cap kernel ramdisk cmdline root extra
    on_poweroff on_reboot on_watchdog on_crash on_soft_reset pv_mode pool
"""
# claim_mode and the overheads (shadow_memory, videoram): creation here takes its memory at once, or fails.
# nomigrate, suspend_cancel: there is nothing yet that migrates.  run_hotplug_scripts: there are no scripts.
# numa_placement: nothing is placed behind the user's back.  pci_*: defaults of an empty pci list.
_INERT = """
    claim_mode shadow_memory videoram nomigrate suspend_cancel run_hotplug_scripts numa_placement pci_msitranslate
    pci_permissive pci_power_mgmt pci_seize vifscript
"""
_TRANSLATED = """
    hap acpi apic nestedhvm altp2m altp2mhvm pvshim pvshim_path pvshim_cmdline pvshim_extra
"""
_HVM_ONLY = """
    oos pae nx timer_mode acpi_s3 acpi_s4 acpi_laptop_slate acpi_firmware smbios_firmware system_firmware boot bios
    bios_path_override hpet vpt_align viridian usb usbdevice usbversion vga stdvga
    vendor_device xen_platform_pci mmio_hole mmio_hole_memkb ms_vm_genid mca_caps hdtype serial soundhw spice spicehost
    spiceport spicetls_port spicedisable_ticketing spicepasswd spiceagent_mouse spicevdagent spice_clipboard_sharing
    spiceusbredirection spice_image_compression spice_streaming_video vkb_device gfx_passthru rdm rdm_mem_boundary
    nographic
    device_model_version device_model_override device_model_stubdomain_override device_model_stubdomain_seclabel
    device_model_args device_model_args_pv device_model_args_hvm device_model_user dm_restrict stubdomain_memory
    stubdomain_kernel stubdomain_ramdisk stubdomain_cmdline vm_watchdog
    hvm_firmware firmware_override vnclisten vncdisplay vncunused vncpasswd opengl keymap display xauthority monitor
    console blkdev_start
"""
_LATER = """
    disk vif vtpm p9 pvcalls vfb vkb vdispl vsnd channel virtio pci usbctrl usbdev dtdev iomem ioports irqs device_tree
    vuart tee gic_version arch_arm vpmu bootloader bootloader_args firmware e820_host vnuma cpuid tsc_mode
    rtc_timeoffset localtime seclabel init_seclabel driver_domain max_grant_frames max_maptrack_frames
    max_grant_version max_event_channels event_channels passthrough policy xend_suspend_evtchn_compat vmtrace_buf_kb
    msr_relaxed vnc sdl sched period slice latency budget extratime nodes pvh
"""

OPTIONS: dict[str, Handling] = {
    name: handling
    for names, handling in (
        (_TYPED, Handling.TYPED),
        (_INERT, Handling.INERT),
        (_TRANSLATED, Handling.TRANSLATED),
        (_HVM_ONLY, Handling.HVM_ONLY),
        (_LATER, Handling.LATER),
    )
    for name in names.split()
}

_ASKS_NOTHING = frozenset({"", "0"})
# Values that name what happens anyway.
_SAME_AS_DEFAULT = {
    "tsc_mode": frozenset({"default", "0", "native", "2"}),
    "passthrough": frozenset({"disabled", "default", "0"}),
    "hap": frozenset({"1"}),
    "acpi": frozenset({"1"}),
    "apic": frozenset({"1"}),
    "altp2m": frozenset({"", "0", "disabled"}),
}


def asks_for_something(name: str, value: Value) -> bool:
    """Whether a host that ignored this setting would differ from one that honours it."""
    if not isinstance(value, str):
        return bool(value)
    return value not in _SAME_AS_DEFAULT.get(name, _ASKS_NOTHING)
