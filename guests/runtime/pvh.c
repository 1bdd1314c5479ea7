/* SPDX-License-Identifier: GPL-2.0-only */
/* A PVH guest's start and end, memory, traps and vCPUs: what test.c, memory.c and trap.c are for a PV guest. */
#include "guest.h"

#define EVENT_VECTOR 0xf3
#define CALLBACK_VECTOR 2ul                     /* type of HVM_PARAM_CALLBACK_IRQ, in its upper byte */

static struct start_info the_start_info;
struct start_info *start_info = &the_start_info;
u16 boot_cs = 8, boot_ss = 16;
struct shared_info *shared;
static u8 shared_page[PAGE_SIZE] PAGE_ALIGNED;
struct vcpu_info *const vcpu0 = (struct vcpu_info *)shared_page;

struct caught caught;
void (*trap_handler)(struct regs *regs);
static void (*nmi_handler)(struct regs *r);

extern u64 pvh_l4[512], pvh_l1[8 * 512], pvh_idt[512];
extern char event_entry[], cpu_entry[];

/* --- memory: guest frames where a PV guest has machine frames --- */

u64 virt_to_pfn(const void *va)
{
    return (u64)va >= VIRT_BASE ? ((u64)va - VIRT_BASE) / PAGE_SIZE : (u64)va / PAGE_SIZE;
}

u64 virt_to_mfn(const void *va)
{
    return virt_to_pfn(va);
}

void *mfn_to_virt(u64 gfn)
{
    return (void *)(gfn < 1 << 18 ? VIRT_BASE + gfn * PAGE_SIZE : gfn * PAGE_SIZE);
}

/* Of the first 16 MiB only. */
volatile u64 *pte_of(const void *va)
{
    return &pvh_l1[virt_to_pfn(va)];
}

s64 remap(const void *va, u64 pte)
{
    *pte_of(va) = pte;
    __asm__ volatile("invlpg (%0)" : : "r"(va) : "memory");
    return 0;
}

/* --- traps --- */

#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) \
                X(18) X(19) X(20) X(21)
#define DECLARE(v) extern char trap_##v[];
EACH(DECLARE)

static void gate(u32 vector, const void *handler)
{
    u64 address = (u64)handler;
    pvh_idt[2 * vector] = (address & 0xffff) | 8ul << 16 | 0x8e00ul << 32 | (address >> 16 & 0xffff) << 48;
    pvh_idt[2 * vector + 1] = address >> 32;
}

void trap_c(struct regs *r)
{
    u64 cr2;
    if (r->vector == 2 && nmi_handler)
        nmi_handler(r);
    else if (trap_handler)
        trap_handler(r);
    else {
        __asm__("mov %%cr2, %0" : "=r"(cr2));
        print("vCPU %u: unexpected trap %ld error %lx at rip %lx rsp %lx cs %lx flags %lx cr2 %lx\n",
              this_cpu(), r->vector, r->error, r->rip, r->rsp, r->cs, r->rflags, cr2);
        shutdown(SHUTDOWN_crash);
    }
}

void cpu_nmi_handler(void (*handler)(struct regs *r))
{
    nmi_handler = handler;
}

/* --- vCPUs --- */

s64 arch_cpu_initialise(u32 cpu, u64 stack)
{
    static struct vcpu_hvm_context c;
    memset(&c, 0, sizeof(c));
    c.mode = VCPU_HVM_MODE_64B;
    c.rip = (u64)cpu_entry;
    c.rsp = stack;
    c.rflags = 2;
    c.cr0 = 0x80010011;
    c.cr3 = virt_to_pfn(pvh_l4) * PAGE_SIZE;
    c.cr4 = 0x620;
    c.efer = 0x500;                             /* LME, LMA */
    return HC3(vcpu_op, VCPUOP_initialise, cpu, &c);
}

/* --- start and end --- */

void shutdown(u32 reason)
{
    console_flush();
    for (;;)
        HC2(sched_op, SCHEDOP_shutdown, &reason);
}

static u64 get_param(u32 index)
{
    struct xen_hvm_param p = { DOMID_SELF, 0, index, 0 };
    return HC2(hvm_op, HVMOP_get_param, &p) ? 0 : p.value;
}

void pvh_main(u64 start)
{
    const struct hvm_start_info *info = mfn_to_virt(0) + start;
    struct xen_add_to_physmap map = { DOMID_SELF, 0, XENMAPSPACE_shared_info, 0, virt_to_pfn(shared_page) };
    struct xen_hvm_param callback = { DOMID_SELF, 0, HVM_PARAM_CALLBACK_IRQ, CALLBACK_VECTOR << 56 | EVENT_VECTOR };
#define GATE(v) gate(v, trap_##v);
    EACH(GATE)
    gate(EVENT_VECTOR, event_entry);
    if (info->magic != HVM_START_MAGIC || HC2(memory_op, XENMEM_add_to_physmap, &map))
        __asm__ volatile("ud2");
    shared = (struct shared_info *)shared_page;
    vcpu_infos[0] = vcpu0;
    start_info->console_mfn = get_param(HVM_PARAM_CONSOLE_PFN);
    start_info->console_evtchn = (u32)get_param(HVM_PARAM_CONSOLE_EVTCHN);
    start_info->pt_base = (u64)pvh_l4;
    if (info->cmdline) {
        const char *text = mfn_to_virt(0) + info->cmdline;
        for (u32 i = 0; i < sizeof(start_info->cmd_line) - 1 && text[i]; i++)
            start_info->cmd_line[i] = text[i];
    }
    if (HC2(hvm_op, HVMOP_set_param, &callback))
        __asm__ volatile("ud2");
    run_tests();
    shutdown(SHUTDOWN_poweroff);
}
