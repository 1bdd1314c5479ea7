/* SPDX-License-Identifier: GPL-2.0-only */
#include "guest.h"

struct caught caught;
struct user_exit user_exit;
void (*trap_handler)(struct regs *regs);
static void (*nmi_handler)(struct regs *r);

extern u64 catch_stack, user_return_stack;
extern char catch_landing[], user_landing[], event_entry[], failsafe_entry[], syscall_entry[];

#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) \
                X(18) X(19) X(20) X(21)
#define DECLARE(v) extern char trap_##v[];
EACH(DECLARE)
DECLARE(128)
DECLARE(145)

#define ENTRY(v) { v, (v) == 3 || (v) == 4 ? 3 : 0, KERNEL_CS, (u64)trap_##v },
static struct trap_info trap_entries[] = {
    EACH(ENTRY)
    { 0x80, 0, KERNEL_CS, (u64)trap_128 },
    { 0x91, 0, KERNEL_CS, (u64)trap_145 },
    { 0, 0, 0, 0 },
};

void traps_init(u8 flags_of_91)
{
    trap_entries[ARRAY_SIZE(trap_entries) - 2].flags = flags_of_91;
    if (HC1(set_trap_table, trap_entries) || HC3(set_callbacks, event_entry, failsafe_entry, syscall_entry))
        __asm__ volatile("ud2");
}

static void __attribute__((noreturn)) die(struct regs *r)
{
    print("vCPU %u: unexpected trap %ld error %lx at rip %lx rsp %lx cs %lx flags %lx cr2 %lx\n",
          this_cpu(), r->vector, r->error, r->rip, r->rsp, r->cs, r->rflags, this_vcpu()->cr2);
    shutdown(SHUTDOWN_crash);
}

/* CS in a frame: bits 0..1 are 0 for the guest kernel and 3 for its user; bit 32 is the old upcall mask. */
void trap_c(struct regs *r)
{
    int from_user = (r->cs & 3) == 3;
    if (r->vector == 2 && nmi_handler)
        nmi_handler(r);
    else if (from_user && user_return_stack) {
        user_exit = (struct user_exit){ (s64)r->vector, r->error, r->rip, r->cs, r->rflags, r->rsp, r->rax, r->rcx,
                                        r->r11, r->ss };
        r->rip = (u64)user_landing;
        r->rsp = user_return_stack;
        r->cs = KERNEL_CS & ~3ul;
        r->ss = KERNEL_SS & ~3ul;
        r->rflags = vcpu0->upcall_mask ? 2 : 0x202;
        user_return_stack = 0;
    } else if (!from_user && catch_stack) {
        caught = (struct caught){ (s64)r->vector, r->error, r->rip, r->cs, r->rflags, r->rsp, vcpu0->cr2,
                                  vcpu0->upcall_mask };
        r->rip = (u64)catch_landing;
        r->rsp = catch_stack;
        r->cs = KERNEL_CS & ~3ul; /* a failsafe frame shows selectors that could not be loaded */
        r->ss = KERNEL_SS & ~3ul;
        r->rflags &= ~0x100ul;
        catch_stack = 0;
    } else if (trap_handler)
        trap_handler(r);
    else
        die(r);
}

void cpu_nmi_handler(void (*handler)(struct regs *r))
{
    nmi_handler = handler;
}

extern char cpu_entry[];
static struct vcpu_guest_context new_context;

/* A vCPU like this one: the same root, trap table and callbacks, a stack of its own. */
s64 arch_cpu_initialise(u32 cpu, u64 stack)
{
    struct vcpu_guest_context *c = &new_context;
    memset(c, 0, sizeof(*c));
    c->flags = VGCF_in_kernel;
    c->regs.rip = (u64)cpu_entry;
    c->regs.rsp = c->kernel_sp = stack;
    c->regs.cs = KERNEL_CS;
    c->regs.ss = c->kernel_ss = KERNEL_SS;
    c->regs.rflags = 0x200;
    for (u32 i = 0; trap_entries[i].address; i++) {
        c->traps[trap_entries[i].vector].vector = trap_entries[i].vector;
        c->traps[trap_entries[i].vector].flags = trap_entries[i].flags;
        c->traps[trap_entries[i].vector].cs = trap_entries[i].cs;
        c->traps[trap_entries[i].vector].address = trap_entries[i].address;
    }
    c->ctrlreg[3] = virt_to_mfn((void *)start_info->pt_base) * PAGE_SIZE;
    c->event_callback = (u64)event_entry;
    c->failsafe_callback = (u64)failsafe_entry;
    c->syscall_callback = (u64)syscall_entry;
    return HC3(vcpu_op, VCPUOP_initialise, cpu, c);
}
