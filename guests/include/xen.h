/* SPDX-License-Identifier: GPL-2.0-only */
/* The part of Xen's public ABI (x86-64 PV) that the test guests use, as data. */
#ifndef GUEST_XEN_H
#define GUEST_XEN_H

#define VIRT_BASE 0xffffffff80000000
#define PAGE_SIZE 4096

/* Hypercalls */
#define HC_set_trap_table 0
#define HC_mmu_update 1
#define HC_set_gdt 2
#define HC_stack_switch 3
#define HC_set_callbacks 4
#define HC_fpu_taskswitch 5
#define HC_set_debugreg 8
#define HC_get_debugreg 9
#define HC_update_descriptor 10
#define HC_memory_op 12
#define HC_multicall 13
#define HC_update_va_mapping 14
#define HC_set_timer_op 15
#define HC_event_channel_op_compat 16
#define HC_xen_version 17
#define HC_console_io 18
#define HC_grant_table_op 20
#define HC_vm_assist 21
#define HC_iret 23
#define HC_vcpu_op 24
#define HC_set_segment_base 25
#define HC_mmuext_op 26
#define HC_sched_op 29
#define HC_callback_op 30
#define HC_event_channel_op 32
#define HC_sysctl 35
#define HC_domctl 36

/* Selectors */
#define KERNEL_CS 0xe033
#define KERNEL_SS 0xe02b
#define USER_CS 0xe033
#define USER_SS 0xe02b

#ifndef __ASSEMBLY__

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef short s16;
typedef long s64;

#define DOMID_SELF 0x7ff0
#define DOMID_IO 0x7ff1
#define DOMID_XEN 0x7ff2

enum { EPERM = 1, ENOENT = 2, ESRCH = 3, ENXIO = 6, EBUSY = 16, EEXIST = 17, EINVAL = 22, EFAULT = 14,
       ENOMEM = 12, ENOSPC = 28, ENOSYS = 38, EOPNOTSUPP = 95 };

struct vcpu_time_info {
    u32 version, pad0;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    signed char tsc_shift;
    u8 flags, pad1[2];
};

struct vcpu_info {
    u8 upcall_pending, upcall_mask, pad[6];
    u64 pending_sel;
    u64 cr2, pad1;
    struct vcpu_time_info time;
};

struct shared_info {
    struct vcpu_info vcpu[32];
    u64 pending[64], mask[64];
    u32 wc_version, wc_sec, wc_nsec, wc_sec_hi;
    u64 max_pfn, p2m_list_list, nmi_reason, p2m_cr3, p2m_vaddr, p2m_generation;
};

struct start_info {
    char magic[32];
    u64 nr_pages, shared_info;
    u32 flags;
    u64 store_mfn;
    u32 store_evtchn;
    u64 console_mfn;
    u32 console_evtchn;
    u64 pt_base, nr_pt_frames, mfn_list, mod_start, mod_len;
    char cmd_line[1024];
    u64 first_p2m_pfn, nr_p2m_frames;
};

struct console_ring {
    char in[1024], out[2048];
    volatile u32 in_cons, in_prod, out_cons, out_prod;
};

struct trap_info { u8 vector, flags; u16 cs; u64 address; };
struct mmu_update { u64 ptr, val; };
struct mmuext_op { u32 cmd, pad; u64 arg1, arg2; };
struct multicall { u64 op; s64 result; u64 args[6]; };

enum { MMUEXT_PIN_L1 = 0, MMUEXT_PIN_L2, MMUEXT_PIN_L3, MMUEXT_PIN_L4, MMUEXT_UNPIN, MMUEXT_NEW_BASEPTR,
       MMUEXT_TLB_FLUSH_LOCAL, MMUEXT_INVLPG_LOCAL, MMUEXT_SET_LDT = 13, MMUEXT_NEW_USER_BASEPTR = 15,
       MMUEXT_CLEAR_PAGE = 16, MMUEXT_COPY_PAGE = 17 };
#define UVMF_INVLPG 2

enum { SCHEDOP_yield, SCHEDOP_block, SCHEDOP_shutdown, SCHEDOP_poll, SCHEDOP_remote_shutdown };
enum { SHUTDOWN_poweroff, SHUTDOWN_reboot, SHUTDOWN_suspend, SHUTDOWN_crash };
struct sched_poll { u64 ports; u32 nr_ports; u64 timeout; };

enum { EVTCHNOP_bind_interdomain, EVTCHNOP_bind_virq, EVTCHNOP_bind_pirq, EVTCHNOP_close, EVTCHNOP_send,
       EVTCHNOP_status, EVTCHNOP_alloc_unbound, EVTCHNOP_bind_ipi, EVTCHNOP_bind_vcpu, EVTCHNOP_unmask, EVTCHNOP_reset,
       EVTCHNOP_init_control };
enum { VIRQ_TIMER = 0, VIRQ_DEBUG = 1, VIRQ_CONSOLE = 2 };

enum { VCPUOP_initialise, VCPUOP_up, VCPUOP_down, VCPUOP_is_up, VCPUOP_get_runstate_info,
       VCPUOP_register_runstate_memory_area, VCPUOP_set_periodic_timer, VCPUOP_stop_periodic_timer,
       VCPUOP_set_singleshot_timer, VCPUOP_stop_singleshot_timer, VCPUOP_register_vcpu_info };
struct vcpu_runstate_info { u32 state; u64 state_entry_time; u64 time[4]; };

enum { XENMEM_increase_reservation, XENMEM_decrease_reservation, XENMEM_maximum_ram_page, XENMEM_current_reservation,
       XENMEM_maximum_reservation, XENMEM_machphys_mfn_list, XENMEM_populate_physmap, XENMEM_memory_map = 9,
       XENMEM_machphys_mapping = 12 };
struct memory_reservation { u64 extent_start, nr_extents; u32 extent_order, mem_flags; u16 domid; };

enum { XENVER_version, XENVER_extraversion, XENVER_compile_info, XENVER_capabilities, XENVER_changeset,
       XENVER_platform_parameters, XENVER_get_features, XENVER_pagesize };

enum { GNTTABOP_map = 0, GNTTABOP_unmap, GNTTABOP_setup_table, GNTTABOP_copy = 5, GNTTABOP_query_size,
       GNTTABOP_set_version = 8, GNTTABOP_get_version = 10 };
struct gnttab_map { u64 host_addr; u32 flags, ref; u16 dom; s16 status; u32 handle; u64 bus; };
struct gnttab_unmap { u64 host_addr, bus; u32 handle; s16 status; };
struct gnttab_setup { u16 dom; u32 nr_frames; s16 status; u64 *frame_list; };
struct gnttab_query { u16 dom; u32 nr_frames, max_nr_frames; s16 status; };
struct gnttab_copy { struct { u64 ref; u16 domid, offset; } source, dest; u16 len, flags; s16 status; };
struct grant_entry { volatile u16 flags; u16 domid; u32 frame; };

enum { SEGBASE_FS, SEGBASE_GS_USER, SEGBASE_GS_KERNEL, SEGBASE_GS_USER_SEL };

#define M2P ((const u64 *)0xffff800000000000)

#endif
#endif
