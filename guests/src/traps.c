/* SPDX-License-Identifier: GPL-2.0-only */
/* Exceptions reach the guest's trap table with the right vector, error code, frame and CR2. */
#include "guest.h"

static u8 page[PAGE_SIZE] PAGE_ALIGNED = { 1 };
extern char de_at[], bp_after[], ud_at[], gp_at[], pf_at[], int_after[], int_at[], db_after[], nm_at[];

#define UNMAPPED 0x0000123456789000ul

static NOINLINE void divide(u64 unused)
{
    __asm__ volatile("xor %%ecx, %%ecx; mov $1, %%eax; cltd\n.globl de_at\nde_at: idivl %%ecx" ::: "eax", "ecx", "edx");
}
static NOINLINE void breakpoint(u64 unused) { __asm__ volatile("int3\n.globl bp_after\nbp_after:"); }
static NOINLINE void undefined(u64 unused) { __asm__ volatile(".globl ud_at\nud_at: ud2"); }
static NOINLINE void load_ds(u64 selector) { __asm__ volatile(".globl gp_at\ngp_at: mov %w0, %%ds" : : "r"(selector)); }
static NOINLINE void read_at(u64 address)
{
    u64 value;
    __asm__ volatile(".globl pf_at\npf_at: mov (%1), %0" : "=r"(value) : "r"(address));
}
static NOINLINE void write_at(u64 address) { *(volatile u64 *)address = 1; }
static NOINLINE void jump_to(u64 address) { ((void (*)(void))address)(); }
static NOINLINE void int91(u64 unused)
{
    __asm__ volatile(".globl int_at\nint_at: int $0x91\n.globl int_after\nint_after:");
}
static NOINLINE void int80(u64 unused) { __asm__ volatile("int $0x80"); }
static NOINLINE void int90(u64 unused) { __asm__ volatile("int $0x90"); }
static NOINLINE void int4(u64 unused) { __asm__ volatile("int $4"); }
static NOINLINE void single_step(u64 unused)
{
    __asm__ volatile("pushf; orl $0x100, (%%rsp); popf\n nop\n.globl db_after\ndb_after: nop" ::: "memory", "cc");
}
static NOINLINE void use_fpu(u64 unused) { __asm__ volatile(".globl nm_at\nnm_at: fninit"); }
static NOINLINE void port_read(u64 port) { __asm__ volatile("inb %w0, %%al" : : "d"(port) : "rax"); }

#define EXPECT(fn, arg, vector_, error_, rip_) do { \
    CHECK_EQ(catch_trap(fn, arg), vector_); \
    CHECK_EQ(caught.error, error_); \
    u64 where_ = (u64)(rip_); \
    if (where_) CHECK_EQ(caught.rip, where_); \
    CHECK_EQ(caught.cs & 0xffff, KERNEL_CS & ~3); \
} while (0)

static void divide_error(void) { EXPECT(divide, 0, 0, 0, de_at); }
static void int3(void) { EXPECT(breakpoint, 0, 3, 0, bp_after); }
static void invalid_opcode(void) { EXPECT(undefined, 0, 6, 0, ud_at); }

static void general_protection(void)
{
    EXPECT(load_ds, 0x10, 13, 0x10, gp_at);
    EXPECT(read_at, 0x8000000000000000, 13, 0, pf_at);
    EXPECT(port_read, 0x71, 13, 0, 0);
}

static void page_fault(void)
{
    EXPECT(read_at, UNMAPPED, 14, 0, pf_at);
    CHECK_EQ(caught.cr2, UNMAPPED);
    EXPECT(write_at, UNMAPPED + 8, 14, 2, 0);
    CHECK_EQ(caught.cr2, UNMAPPED + 8);
    CHECK_EQ(remap(page, virt_to_mfn(page) * PAGE_SIZE | PTE_KERNEL_RO), 0);
    EXPECT(write_at, (u64)page, 14, 3, 0);
    CHECK_EQ(caught.cr2, (u64)page);
    CHECK_EQ(remap(page, virt_to_mfn(page) * PAGE_SIZE | PTE_KERNEL_RW), 0);
    CHECK_EQ(catch_trap(write_at, (u64)page), -1);
}

static void no_execute(void)
{
    CHECK_EQ(remap(page, virt_to_mfn(page) * PAGE_SIZE | PTE_KERNEL_RW | 1ul << 63), 0);
    page[0] = 0xc3;
    EXPECT(jump_to, (u64)page, 14, 0x11, page);
    CHECK_EQ(caught.cr2, (u64)page);
    CHECK_EQ(remap(page, virt_to_mfn(page) * PAGE_SIZE | PTE_KERNEL_RW), 0);
    CHECK_EQ(catch_trap(jump_to, (u64)page), -1);
}

static void xen_area_is_out_of_reach(void)
{
    CHECK_EQ(catch_trap(write_at, (u64)M2P), 14);
    CHECK_EQ(caught.error & 2, 2);
    CHECK_EQ(catch_trap(write_at, 0xffff820000000000), 14);
    CHECK_EQ(catch_trap(read_at, 0xffff830000000000), 14);
    CHECK_EQ(catch_trap(read_at, 0xffff87fffffff000), 14);
}

/* A gate may be used by the guest kernel if its DPL is not 0, by user mode if it is 3. */
static void software_interrupts(void)
{
    traps_init(0);
    EXPECT(int91, 0, 13, 0x91 * 8 + 2, int_at);
    EXPECT(int80, 0, 128, 0, 0);                /* Xen's direct gate for system calls asks nobody */
    traps_init(1);
    EXPECT(int91, 0, 0x91, 0, int_after);
    EXPECT(int90, 0, 13, 0x90 * 8 + 2, 0);
    EXPECT(int4, 0, 4, 0, 0);
    traps_init(0);
}

static void gates_can_mask_events(void)
{
    vcpu0->upcall_mask = 0;
    traps_init(1);
    CHECK_EQ(catch_trap(int91, 0), 0x91);
    CHECK_EQ(caught.upcall_mask, 0);
    CHECK_EQ(caught.rflags & 0x200, 0x200);
    traps_init(1 | 4);
    CHECK_EQ(catch_trap(int91, 0), 0x91);
    CHECK_EQ(caught.upcall_mask, 1);
    CHECK_EQ(caught.rflags & 0x200, 0x200);     /* IF in the frame is the mask before */
    CHECK_EQ(caught.cs >> 32, 0);
    CHECK_EQ(vcpu0->upcall_mask, 0);            /* and the return restored it */
    vcpu0->upcall_mask = 1;
    CHECK_EQ(catch_trap(int91, 0), 0x91);
    CHECK_EQ(caught.rflags & 0x200, 0);
    CHECK_EQ(caught.cs >> 32, 1);
    CHECK_EQ(vcpu0->upcall_mask, 1);
    traps_init(0);
}

static void trap_flag(void)
{
    EXPECT(single_step, 0, 1, 0, db_after);
    CHECK_EQ(HC1(get_debugreg, 6) & 0x4000, 0x4000);
}

static u64 watched;

static NOINLINE void write_watched(u64 value) { *(volatile u64 *)&watched = value; }

static void debug_registers(void)
{
    CHECK_EQ(HC2(set_debugreg, 0, &watched), 0);
    CHECK_EQ(HC1(get_debugreg, 0), (u64)&watched);
    CHECK_EQ(HC2(set_debugreg, 1, 0xffff830000000000), -EPERM);
    CHECK_EQ(HC2(set_debugreg, 9, 0), -EINVAL);
}

static void data_watchpoint(void)
{
    CHECK_EQ(HC2(set_debugreg, 0, &watched), 0);
    CHECK_EQ(HC2(set_debugreg, 7, 0x400 | 1 | 1 << 16 | 2 << 18), 0);       /* L0, write, 8 bytes */
    s64 vector = catch_trap(write_watched, 7);
    HC2(set_debugreg, 7, 0x400);
    CHECK_EQ(watched, 7);
    CHECK_EQ(vector, 1);
    CHECK_EQ(HC1(get_debugreg, 6) & 0xf, 1);
    CHECK_EQ(catch_trap(write_watched, 8), -1);
}

static void execution_breakpoint(void)
{
    CHECK_EQ(HC2(set_debugreg, 2, ud_at), 0);
    CHECK_EQ(HC2(set_debugreg, 7, 0x400 | 1 << 4), 0);
    s64 vector = catch_trap(undefined, 0);
    HC2(set_debugreg, 7, 0x400);
    CHECK_EQ(vector, 1);
    CHECK_EQ(caught.rip, (u64)ud_at);
    CHECK_EQ(HC1(get_debugreg, 6) & 0xf, 4);
}

static void device_not_available(void)
{
    CHECK_EQ(HC1(fpu_taskswitch, 1), 0);
    EXPECT(use_fpu, 0, 7, 0, nm_at);
    CHECK_EQ(catch_trap(use_fpu, 0), -1);       /* Xen cleared TS before it delivered the trap */
}

static void bad_trap_tables(void)
{
    const struct trap_info bad[] = { { 3, 0, KERNEL_CS, 0x8000000000000000 }, { 0, 0, 0, 0 } };
    CHECK_EQ(HC1(set_trap_table, bad), -EINVAL);
    CHECK_EQ(HC1(set_trap_table, UNMAPPED), -EFAULT);
    traps_init(0);
}

static void nested_traps(void)
{
    for (u32 i = 0; i < 1000; i++) {
        CHECK_EQ(catch_trap(undefined, 0), 6);
        CHECK_EQ(catch_trap(load_ds, 0x10), 13);        /* the second #GP must not become a double fault */
        CHECK_EQ(catch_trap(read_at, UNMAPPED), 14);
        CHECK_EQ(catch_trap(breakpoint, 0), 3);
    }
}

TESTS({ "divide_error", divide_error }, { "int3", int3 }, { "invalid_opcode", invalid_opcode },
      { "general_protection", general_protection }, { "page_fault", page_fault }, { "no_execute", no_execute },
      { "xen_area_is_out_of_reach", xen_area_is_out_of_reach }, { "software_interrupts", software_interrupts },
      { "gates_can_mask_events", gates_can_mask_events }, { "trap_flag", trap_flag },
      { "debug_registers", debug_registers }, { "data_watchpoint", data_watchpoint },
      { "execution_breakpoint", execution_breakpoint },
      { "device_not_available", device_not_available }, { "bad_trap_tables", bad_trap_tables },
      { "nested_traps", nested_traps });
