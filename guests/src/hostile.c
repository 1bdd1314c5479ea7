/* SPDX-License-Identifier: GPL-2.0-only */
/* A guest that means harm with all its vCPUs, for `seconds=`. `what=`:
   1 IPIs to everybody from everybody            2 computing with events off
   3 faults whose handlers fault                 4 its shared_info and vcpu_info unmapped and given away
   5 vCPUs started anywhere                      6 vCPUs that take each other down
   7 timers in the past, polls, yields           8 initialisation of one vCPU by all the others, with bad tables
   9 flushes of everybody all the time          10 NMIs to everybody, whose handlers send NMIs
  11 stacks that grow through everything
   Ends with "STILL HERE" and a power off, where it can. */
#include "guest.h"

#define S 1000000000ul

static u32 cpus, what;
static u64 end;
static u32 port[MAX_CPUS];
static u8 scratch[8 * PAGE_SIZE] PAGE_ALIGNED;
static struct vcpu_guest_context context;

static u64 chance(void)
{
    static u64 state = 88172645463325252ul;
    u64 x = state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return state = x;
}

static void send_to_all(void)
{
    for (u32 i = 0; i < cpus; i++)
        evtchn_port_op(EVTCHNOP_send, port[i]);
}

/* Push until there is no stack: through everything that lies below it. */
static void overflow(void)
{
    __asm__ volatile("1: push $0\n jmp 1b");
}

/* Every trap's handler lies where nothing is; then the first fault. */
static void fault_for_ever(void)
{
#ifdef PVH
    struct { u16 limit; u64 base; } __attribute__((packed)) none = { 0, 0 };
    __asm__ volatile("lidt %0" : : "m"(none));
#else
    static struct trap_info table[22];
    for (u32 i = 0; i < 21; i++)
        table[i] = (struct trap_info){ (u8)i, 0, KERNEL_CS, 0x1000 + i };
    HC1(set_trap_table, table);
#endif
    __asm__ volatile("ud2");
}

static void unmap_own_info(void)
{
#ifndef PVH
    struct { u64 mfn; u32 offset, reserved; } info = { virt_to_mfn(scratch), 64, 0 };
    u64 frame = virt_to_mfn(scratch);
    struct memory_reservation give = { (u64)&frame, 1, 0, 0, DOMID_SELF };
    HC3(vcpu_op, VCPUOP_register_vcpu_info, this_cpu(), &info);
    remap(scratch, 0);
    HC2(memory_op, XENMEM_decrease_reservation, &give);
    remap((void *)shared, 0);
    for (u64 start = 0; start < 50000; start++) {
        HC2(sched_op, SCHEDOP_yield, 0);
        evtchn_port_op(EVTCHNOP_send, port[start % cpus]);
    }
    HC2(sched_op, SCHEDOP_block, 0);            /* enables events: the upcall reads what is gone */
#endif
}

static void start_anywhere(void)
{
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        if (cpu < 32)
            vcpu_infos[cpu] = &shared->vcpu[cpu];
        for (u32 tries = 0; tries < 20000; tries++) {
            u64 *words = (u64 *)&context;
#ifdef PVH
            for (u32 i = 0; i < 32; i++)
                words[i] = chance() % 4 ? 0 : chance() >> chance() % 64;
            words[0] = chance() % 3;            /* the mode: 32 bits, 64 bits, none */
#endif
            for (u32 i = 64; i < sizeof(context) / 8; i++)
                words[i] = chance() % 4 ? 0 : chance() >> chance() % 64;
            if (chance() % 2) {
                context.flags |= VGCF_in_kernel;
                context.ctrlreg[3] = virt_to_mfn((void *)start_info->pt_base) * PAGE_SIZE;
                context.ctrlreg[1] = context.gdt_ents = context.ldt_ents = 0;
                for (u32 i = 0; i < 256; i++)
                    context.traps[i].address &= 0x7fffffffffff;
                context.event_callback &= 0x7fffffffffff;
                context.failsafe_callback &= 0x7fffffffffff;
                context.syscall_callback &= 0x7fffffffffff;
                context.regs.rip &= 0x7fffffffffff;
                context.fs_base = context.gs_base_kernel = context.gs_base_user = 0;
            }
            if (!HC3(vcpu_op, VCPUOP_initialise, cpu, &context)) {
                print("vCPU %u starts at %lx\n", cpu, context.regs.rip);
                cpu_up(cpu);
                for (u32 i = 0; i < 10; i++)
                    wait_a_little();
                break;
            }
        }
    }
}

static void bad_tables(void)
{
    for (u32 i = 0; i < 64 && now_ns() < end; i++) {
        u64 *table = (u64 *)(scratch + chance() % 8 * PAGE_SIZE);
        table[chance() % 512] = chance() % 2 ? virt_to_mfn(scratch + chance() % 8 * PAGE_SIZE) * PAGE_SIZE | PTE_TABLE
                                             : chance();
        context.flags = VGCF_in_kernel;
        context.ctrlreg[3] = virt_to_mfn(chance() % 4 ? table : (u64 *)start_info->pt_base) * PAGE_SIZE;
        context.ctrlreg[1] = chance() % 2 ? virt_to_mfn(scratch + chance() % 8 * PAGE_SIZE) * PAGE_SIZE : 0;
        context.gdt_ents = chance() % 2 ? 0 : 512;
        context.gdt_frames[0] = virt_to_mfn(scratch + chance() % 8 * PAGE_SIZE);
        HC3(vcpu_op, VCPUOP_initialise, cpus - 1, &context);
    }
}

static void on_nmi(struct regs *regs)
{
    if (now_ns() < end)
        send_nmi((this_cpu() + 1) % cpus);
}

static volatile u32 ready;

static void harm(u64 arg)
{
    u32 cpu = this_cpu();
    (void)arg;
    __atomic_fetch_add(&ready, 1, __ATOMIC_SEQ_CST);
    while (what == 10 && ready < cpus)          /* an NMI before there is an IDT would be the end of a PVH guest */
        wait_a_little();
    if (what == 1)
        events_on();
    while (now_ns() < end)
        switch (what) {
        case 1:
            send_to_all();
            break;
        case 2:
            events_off();
            for (u32 i = 0; i < 10000000; i++)
                barrier();
            break;
        case 3:
            fault_for_ever();
            break;
        case 4:
            unmap_own_info();
            break;
        case 6:
            cpu_up((u32)(chance() % cpus));
            HC3(vcpu_op, VCPUOP_down, 1 + chance() % (cpus - 1), 0);    /* never the last: that would be the end */
            break;
        case 7: {
            struct { u64 timeout; u32 flags; } past = { chance() % 3, 0 };
            u64 period = 1000000;
            struct sched_poll p = { (u64)&port[cpu], 1, 1 };
            HC3(vcpu_op, VCPUOP_set_singleshot_timer, cpu, &past);
            HC3(vcpu_op, VCPUOP_set_periodic_timer, chance() % cpus, &period);
            HC2(sched_op, SCHEDOP_poll, &p);
            HC2(sched_op, SCHEDOP_yield, 0);
            break;
        }
        case 8:
            bad_tables();
            break;
        case 9: {
#ifndef PVH
            u64 mask[2] = { ~0ul, ~0ul };
            struct mmuext_op flush[3] = { { MMUEXT_TLB_FLUSH_ALL, 0, 0, 0 }, { MMUEXT_TLB_FLUSH_MULTI, 0, 0, (u64)mask },
                                          { MMUEXT_INVLPG_MULTI, 0, chance(), (u64)mask } };
            HC4(mmuext_op, flush, 3, 0, DOMID_SELF);
#endif
            break;
        }
        case 11:
            overflow();
            break;
        case 10:
            send_nmi((u32)(chance() % cpus));
            break;
        default:
            wait_a_little();
        }
    if (cpu)
        cpu_down();
}

static void hostile(void)
{
    what = (u32)cmdline_number("what", 1);
    end = now_ns() + cmdline_number("seconds", 2) * S;
    cpus = nr_cpus();
    CHECK(cpus > 1, "one vCPU is not enough");
    for (u32 cpu = 0; cpu < cpus; cpu++)
        port[cpu] = (u32)bind_ipi(cpu);
    cpu_nmi_handler(on_nmi);
    if (what == 5)
        start_anywhere();
    else
        for (u32 cpu = 1; cpu < cpus - (what == 8); cpu++)     /* 8 leaves the last one to be initialised */
            if (cpu_start(cpu, harm, 0))
                print("vCPU %u does not start\n", cpu);
    harm(0);
    print("STILL HERE\n");
}

TESTS({ "hostile", hostile });
