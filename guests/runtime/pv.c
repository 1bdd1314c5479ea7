/* SPDX-License-Identifier: GPL-2.0-only */
/* Start and end of a PV guest. */
#include "guest.h"

struct start_info *start_info;
u16 boot_cs, boot_ss;
struct shared_info *shared;
static u8 shared_page[PAGE_SIZE] PAGE_ALIGNED;
struct vcpu_info *const vcpu0 = (struct vcpu_info *)shared_page;

static u8 trap_stack[16384] __attribute__((aligned(16)));   /* where traps from user mode arrive */

void shutdown(u32 reason)
{
    console_flush();
    for (;;)
        HC2(sched_op, SCHEDOP_shutdown, &reason);
}

void guest_main(struct start_info *start)
{
    start_info = start;
    vcpu_infos[0] = vcpu0;
    __asm__("mov %%cs, %0\n mov %%ss, %1" : "=r"(boot_cs), "=r"(boot_ss));
    shared = (struct shared_info *)shared_page;
    if (HC3(update_va_mapping, shared_page, start->shared_info | PTE_KERNEL_RW, UVMF_INVLPG))
        __asm__ volatile("ud2");
    traps_init(0);
    HC2(stack_switch, KERNEL_SS, trap_stack + sizeof(trap_stack));
    run_tests();
    shutdown(SHUTDOWN_poweroff);
}
