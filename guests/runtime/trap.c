/* SPDX-License-Identifier: GPL-2.0-only */
#include "guest.h"

struct caught caught;
struct user_exit user_exit;
void (*trap_handler)(struct regs *regs);

extern u64 catch_stack, user_return_stack;
extern char catch_landing[], user_landing[], event_entry[], failsafe_entry[], syscall_entry[];

#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) \
                X(18) X(19) X(20) X(21)
#define DECLARE(v) extern char trap_##v[];
EACH(DECLARE)
DECLARE(128)
DECLARE(145)

void traps_init(u8 flags_of_91)
{
#define ENTRY(v) { v, (v) == 3 || (v) == 4 ? 3 : 0, KERNEL_CS, (u64)trap_##v },
    const struct trap_info table[] = {
        EACH(ENTRY)
        { 0x80, 0, KERNEL_CS, (u64)trap_128 },
        { 0x91, flags_of_91, KERNEL_CS, (u64)trap_145 },
        { 0, 0, 0, 0 },
    };
    if (HC1(set_trap_table, table) || HC3(set_callbacks, event_entry, failsafe_entry, syscall_entry))
        __asm__ volatile("ud2");
}

static void __attribute__((noreturn)) die(struct regs *r)
{
    print("unexpected trap %ld error %lx at rip %lx rsp %lx cs %lx flags %lx cr2 %lx\n",
          r->vector, r->error, r->rip, r->rsp, r->cs, r->rflags, vcpu0->cr2);
    shutdown(SHUTDOWN_crash);
}

/* CS in a frame: bits 0..1 are 0 for the guest kernel and 3 for its user; bit 32 is the old upcall mask. */
void trap_c(struct regs *r)
{
    int from_user = (r->cs & 3) == 3;
    if (from_user && user_return_stack) {
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
