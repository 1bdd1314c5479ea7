/* SPDX-License-Identifier: GPL-2.0-only */
/* Far returns of a guest kernel: IRETQ, LRETQ and HYPERVISOR_iret, with the selectors and flags of the ABI. */
#include "guest.h"

static u64 selector_cs(void) { u64 s; __asm__("mov %%cs, %0" : "=r"(s)); return s; }
static u64 selector_ss(void) { u64 s; __asm__("mov %%ss, %0" : "=r"(s)); return s; }
static u64 flags(void) { u64 f; __asm__ volatile("pushf; pop %0" : "=r"(f)); return f; }

static NOINLINE u64 do_iretq(u64 cs, u64 ss, u64 rflags)
{
    u64 out;
    __asm__ volatile("mov %%rsp, %%rax\n"
                     "push %2\n push %%rax\n push %3\n push %1\n lea 1f(%%rip), %%rax\n push %%rax\n"
                     "iretq\n"
                     "1: pushf\n pop %0\n"
                     : "=&r"(out) : "r"(cs), "r"(ss), "r"(rflags) : "rax", "memory", "cc");
    return out;
}

static NOINLINE void do_lretq(u64 cs)
{
    __asm__ volatile("push %0\n lea 1f(%%rip), %%rax\n push %%rax\n lretq\n1:" : : "r"(cs) : "rax", "memory");
}

static NOINLINE u64 do_hypercall_iret(u64 cs, u64 ss, u64 rflags, u64 *rcx)
{
    u64 out, c;
    __asm__ volatile("mov %%rsp, %%rax\n"
                     "push %3\n push %%rax\n push %4\n push %2\n lea 1f(%%rip), %%rax\n push %%rax\n"
                     "pushq $0\n pushq $0x1234\n pushq $0x5678\n pushq $0x77\n"
                     "mov %5, %%eax\n syscall\n"
                     "1: pushf\n pop %0\n mov %%rcx, %1\n"
                     : "=&r"(out), "=&r"(c) : "r"(cs), "r"(ss), "r"(rflags), "i"(HC_iret)
                     : "rax", "rcx", "r11", "memory", "cc");
    *rcx = c;
    return out;
}

/* The visible difference of fast mode (fast=1 on the command line): the kernel's own selectors have a lower RPL, and it
   must do with those of the ABI all the same. */
static void flat_selectors(void)
{
    if (cmdline_number("fast", 0)) {
        CHECK((boot_cs & 3) != 3 && (boot_ss & 3) != 3, "cs %x ss %x", boot_cs, boot_ss);
        return;
    }
    CHECK_EQ(boot_cs, KERNEL_CS);
    CHECK_EQ(boot_ss, KERNEL_SS);
}

static void iretq(void)
{
    for (u32 i = 0; i < 100; i++) {
        CHECK_EQ(do_iretq(KERNEL_CS, KERNEL_SS, 0x202 | 0xd5) & 0xdd5, 0xd5);
        CHECK_EQ(do_iretq(KERNEL_CS, KERNEL_SS, 0x202) & 0xdd5, 0);
        CHECK_EQ(do_iretq(KERNEL_CS, KERNEL_SS, 0x602) & 0xdd5, 0x400);
        __asm__ volatile("cld");
    }
    CHECK_EQ(selector_cs() & 0xffff, boot_cs);
    CHECK_EQ(selector_ss() & 0xffff, boot_ss);
}

static void lretq(void)
{
    for (u32 i = 0; i < 100; i++)
        do_lretq(KERNEL_CS);
    CHECK_EQ(selector_cs() & 0xffff, boot_cs);
    CHECK_EQ(HC2(xen_version, XENVER_version, 0), 4 << 16 | 6);     /* still the kernel */
}

static void iretq_as_catch(u64 cs) { do_iretq(cs, KERNEL_SS, 0x202); }
static void lretq_as_catch(u64 cs) { do_lretq(cs); }
static void load_ss(u64 selector) { __asm__ volatile("mov %w0, %%ss" : : "r"(selector)); }

/* Ring 0 is Xen's: a return may not ask for more privilege than the guest has. */
static void returns_to_ring_0_fault(void)
{
    CHECK_EQ(catch_trap(iretq_as_catch, KERNEL_CS & ~3), 13);
    CHECK_EQ(caught.error, KERNEL_CS & ~3);
    CHECK_EQ(catch_trap(lretq_as_catch, KERNEL_CS & ~3), 13);
    CHECK_EQ(caught.error, KERNEL_CS & ~3);
    CHECK_EQ(catch_trap(iretq_as_catch, 0xe008), 13);
    CHECK_EQ(catch_trap(lretq_as_catch, 0xe010), 13);
}

static void stack_segment(void)
{
    CHECK_EQ(catch_trap(load_ss, KERNEL_SS), -1);
    CHECK_EQ(selector_ss() & 0xffff, boot_ss);
    CHECK_EQ(catch_trap(load_ss, 0x10 | 3), 13);
    CHECK_EQ(caught.error, 0x10);
}

static void hypervisor_iret_to_kernel(void)
{
    u64 rcx;
    CHECK_EQ(do_hypercall_iret(KERNEL_CS & ~3, KERNEL_SS & ~3, 0x202 | 0xd5, &rcx) & 0xdd5, 0xd5);
    CHECK_EQ(rcx, 0x1234);
    CHECK_EQ(selector_cs() & 0xffff, boot_cs);
    CHECK_EQ(do_hypercall_iret(KERNEL_CS & ~3, KERNEL_SS, 0x2, &rcx) & 0xdd5, 0);
}

/* IF in the frame is the upcall mask; the real flag stays set, and IOPL 0. */
static void hypervisor_iret_sets_the_mask(void)
{
    u64 rcx;
    do_hypercall_iret(KERNEL_CS & ~3, KERNEL_SS, 0x202, &rcx);
    CHECK_EQ(vcpu0->upcall_mask, 0);
    do_hypercall_iret(KERNEL_CS & ~3, KERNEL_SS, 0x2, &rcx);
    CHECK_EQ(vcpu0->upcall_mask, 1);
    CHECK_EQ(flags() & 0x200, 0x200);
    do_hypercall_iret(KERNEL_CS & ~3, KERNEL_SS, 0x3002, &rcx);
    CHECK_EQ(flags() & 0x20000, 0);
}

static void bad_iret(u64 cs) { u64 rcx; do_hypercall_iret(cs, KERNEL_SS, 0x202, &rcx); }

static void bad_selectors_reach_the_failsafe_callback(void)
{
    CHECK_EQ(catch_trap(bad_iret, 0x1230), -2);
    CHECK_EQ(caught.cs & 0xffff, 0x1230);
    CHECK_EQ(catch_trap(bad_iret, 0x0), -2);
    CHECK_EQ(HC2(xen_version, XENVER_version, 0), 4 << 16 | 6);
    vcpu0->upcall_mask = 1;
}

static NOINLINE void iret_to(u64 rip)
{
    __asm__ volatile("mov %%rsp, %%rax\n push %1\n push %%rax\n pushq $2\n push %2\n push %0\n"
                     "pushq $0\n pushq $0\n pushq $0\n pushq $0\n mov %3, %%eax\n syscall"
                     : : "r"(rip), "r"((u64)KERNEL_SS), "r"((u64)KERNEL_CS & ~3), "i"(HC_iret) : "rax", "memory");
}

static void non_canonical_target(void)
{
    CHECK_EQ(catch_trap(iret_to, 0x8000000000000000), -2); /* Xen's own IRETQ faults: the failsafe callback */
    CHECK_EQ(caught.rip, 0x8000000000000000);
}

TESTS({ "flat_selectors", flat_selectors }, { "iretq", iretq }, { "lretq", lretq },
      { "returns_to_ring_0_fault", returns_to_ring_0_fault }, { "stack_segment", stack_segment },
      { "hypervisor_iret_to_kernel", hypervisor_iret_to_kernel },
      { "hypervisor_iret_sets_the_mask", hypervisor_iret_sets_the_mask },
      { "bad_selectors_reach_the_failsafe_callback", bad_selectors_reach_the_failsafe_callback },
      { "non_canonical_target", non_canonical_target });
