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
#define HC_hvm_op 34
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

enum { EPERM = 1, ENOENT = 2, ESRCH = 3, ENXIO = 6, ENODEV = 19, EBUSY = 16, EEXIST = 17, EINVAL = 22, EFAULT = 14,
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
       MMUEXT_TLB_FLUSH_LOCAL, MMUEXT_INVLPG_LOCAL, MMUEXT_TLB_FLUSH_MULTI, MMUEXT_INVLPG_MULTI,
       MMUEXT_TLB_FLUSH_ALL, MMUEXT_INVLPG_ALL, MMUEXT_SET_LDT = 13, MMUEXT_NEW_USER_BASEPTR = 15,
       MMUEXT_CLEAR_PAGE = 16, MMUEXT_COPY_PAGE = 17 };
#define UVMF_TLB_FLUSH 1
#define UVMF_INVLPG 2
#define UVMF_ALL 4

enum { SCHEDOP_yield, SCHEDOP_block, SCHEDOP_shutdown, SCHEDOP_poll, SCHEDOP_remote_shutdown };
enum { SHUTDOWN_poweroff, SHUTDOWN_reboot, SHUTDOWN_suspend, SHUTDOWN_crash };
struct sched_poll { u64 ports; u32 nr_ports; u64 timeout; };

enum { EVTCHNOP_bind_interdomain, EVTCHNOP_bind_virq, EVTCHNOP_bind_pirq, EVTCHNOP_close, EVTCHNOP_send,
       EVTCHNOP_status, EVTCHNOP_alloc_unbound, EVTCHNOP_bind_ipi, EVTCHNOP_bind_vcpu, EVTCHNOP_unmask, EVTCHNOP_reset,
       EVTCHNOP_init_control };
enum { VIRQ_TIMER = 0, VIRQ_DEBUG = 1, VIRQ_CONSOLE = 2 };

enum { VCPUOP_initialise, VCPUOP_up, VCPUOP_down, VCPUOP_is_up, VCPUOP_get_runstate_info,
       VCPUOP_register_runstate_memory_area, VCPUOP_set_periodic_timer, VCPUOP_stop_periodic_timer,
       VCPUOP_set_singleshot_timer, VCPUOP_stop_singleshot_timer, VCPUOP_register_vcpu_info, VCPUOP_send_nmi };
enum { RUNSTATE_running, RUNSTATE_runnable, RUNSTATE_blocked, RUNSTATE_offline };
struct vcpu_guest_context {
    u8 fpu[512];
    u64 flags;
    struct {
        u64 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
        u32 error_code, entry_vector;
        u64 rip;
        u16 cs, pad0;
        u8 saved_upcall_mask, pad1[3];
        u64 rflags, rsp, ss, es, ds, fs, gs;
    } regs;
    struct { u8 vector, flags; u16 cs; u64 address; } traps[256];
    u64 ldt_base, ldt_ents, gdt_frames[16], gdt_ents, kernel_ss, kernel_sp, ctrlreg[8], debugreg[8];
    u64 event_callback, failsafe_callback, syscall_callback, vm_assist, fs_base, gs_base_kernel, gs_base_user;
};
#define VGCF_in_kernel 4
/* A PVH guest's: hvm/hvm_vcpu.h */
struct vcpu_hvm_context {
    u32 mode, pad;
    u64 rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, rip, rflags, cr0, cr3, cr4, efer;
    u64 pad2[16];
};
#define VCPU_HVM_MODE_64B 1
struct hvm_start_info {
    u32 magic, version, flags, nr_modules;
    u64 modlist, cmdline, rsdp, memmap;
    u32 memmap_entries, reserved;
};
#define HVM_START_MAGIC 0x336ec578
struct xen_hvm_param { u16 domid, pad; u32 index; u64 value; };
enum { HVMOP_set_param, HVMOP_get_param, HVMOP_flush_tlbs = 5 };
enum { HVM_PARAM_CALLBACK_IRQ = 0, HVM_PARAM_CONSOLE_PFN = 17, HVM_PARAM_CONSOLE_EVTCHN = 18 };
struct xen_add_to_physmap { u16 domid, size; u32 space; u64 idx, gpfn; };
#define XENMAPSPACE_shared_info 0
struct vcpu_runstate_info { u32 state; u64 state_entry_time; u64 time[4]; };

enum { XENMEM_increase_reservation, XENMEM_decrease_reservation, XENMEM_maximum_ram_page, XENMEM_current_reservation,
       XENMEM_maximum_reservation, XENMEM_machphys_mfn_list, XENMEM_populate_physmap, XENMEM_add_to_physmap,
       XENMEM_memory_map = 9,
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
