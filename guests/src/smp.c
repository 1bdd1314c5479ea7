/* SPDX-License-Identifier: GPL-2.0-only */
/* Many vCPUs, whatever their number: bring-up and its errors, IPIs, polling, TLB shoot-down, timers, run states, NMIs,
   taking down and bringing up again. */
#include "guest.h"

#define MS 1000000ul

static u32 cpus;
static volatile u32 started[MAX_CPUS];          /* how often a vCPU went through worker()'s top */
static volatile u32 command[MAX_CPUS];
static volatile u32 done[MAX_CPUS];             /* the number of commands carried out */
static volatile u64 argument;
static volatile s64 answer[MAX_CPUS];
static u32 ipi[MAX_CPUS];                       /* port of each vCPU */
static u32 wake[MAX_CPUS];                      /* another one, masked: for tell() */
static s64 timer[MAX_CPUS];
static volatile u32 nmis[MAX_CPUS];
static volatile u32 upcall_cpu[4096];           /* which vCPU took the last event of a port, + 1 */
static struct vcpu_runstate_info areas[MAX_CPUS];

enum { IDLE, SELF, DOWN, BLOCK, POLL, SPIN, SPIN_OFF, READ, TIMERS, LOCKS, AREA, SEND_ALL, BRING_BACK };

static void *volatile flush_on_ipi;             /* PVH: what the handler of an IPI is to flush */

static void hook(u32 port, struct regs *regs)
{
#ifdef PVH
    if (flush_on_ipi)
        __asm__ volatile("invlpg (%0)" : : "r"(flush_on_ipi) : "memory");
#endif
    upcall_cpu[port] = this_cpu() + 1;
}

static void on_nmi(struct regs *regs)
{
    nmis[this_cpu()]++;
}

static spinlock lock;
static volatile u64 counter;
static u64 *volatile window;

static s64 carry_out(u32 cpu, u32 what)
{
    switch (what) {
    case SELF:
        return (s64)this_cpu();
    case DOWN:
        cpu_down();
        return 0;
    case BLOCK: {                               /* until an IPI comes */
        u64 seen = event_count[ipi[cpu]];
        while (event_count[ipi[cpu]] == seen)
            block();
        return (s64)event_count[ipi[cpu]];
    }
    case POLL: {                                /* masked: only the poll sees it */
        mask_port(ipi[cpu], 1);
        s64 rc = poll_port(ipi[cpu], now_ns() + 20000 * MS);
        int pending = shared->pending[ipi[cpu] / 64] >> ipi[cpu] % 64 & 1;
        evtchn_port_op(EVTCHNOP_unmask, ipi[cpu]);
        events_on();
        events_off();
        return rc ? rc : pending;
    }
    case SPIN: {                                /* compute with events on until one comes */
        u64 seen = event_count[ipi[cpu]];
        events_on();
        while (event_count[ipi[cpu]] == seen)
            relax();
        events_off();
        return 1;
    }
    case SPIN_OFF:                              /* compute with events off until told otherwise */
        while (argument)
            relax();
        return 1;
    case READ: {                                /* what is at the window changes only by a shoot-down */
        u64 first = *(volatile u64 *)window;
        answer[cpu] = (s64)first;
        if (!argument)
            return (s64)first;
        events_on();
        while (*(volatile u64 *)window == first && argument)
            relax();
        events_off();
        return (s64)*(volatile u64 *)window;
    }
    case TIMERS: {
        s64 port = timer[cpu];
        if (!port)
            port = timer[cpu] = bind_virq(VIRQ_TIMER, cpu);
        if (port < 0)
            return port;
        s64 rc = HC3(vcpu_op, VCPUOP_stop_periodic_timer, cpu, 0);
        events_on();                            /* a tick may have come before that */
        wait_a_little();
        events_off();
        u64 period = 2 * MS, seen = event_count[port], start = now_ns();
        struct { u64 timeout; u32 flags; } one = { start + 3 * MS, 0 };
        if (!rc)
            rc = HC3(vcpu_op, VCPUOP_set_singleshot_timer, cpu, &one);
        if (rc)
            return rc;
        while (event_count[port] == seen && now_ns() < start + 10000 * MS) {
            events_on();
            wait_a_little();
            events_off();
        }
        if (event_count[port] == seen || now_ns() < start + 3 * MS)
            return -1000;
        rc = HC3(vcpu_op, VCPUOP_set_periodic_timer, cpu, &period);
        for (u32 tick = 0; tick < 3; tick++) {
            seen = event_count[port];
            start = now_ns();
            while (event_count[port] == seen && now_ns() < start + 10000 * MS) {
                events_on();
                wait_a_little();
                events_off();
            }
            if (event_count[port] == seen)
                return -2000 - tick;
        }
        if (upcall_cpu[port] != cpu + 1)
            return -3000 - upcall_cpu[port];
        return rc ? rc : HC3(vcpu_op, VCPUOP_stop_periodic_timer, cpu, 0);
    }
    case LOCKS:
        for (u32 i = 0; i < 300; i++) {
            if (i & 1)
                spin_lock(&lock);
            else
                yield_lock(&lock);
            u64 value = counter;
            for (u32 wait = 0; wait < 50; wait++)
                barrier();
            counter = value + 1;
            spin_unlock(&lock);
        }
        return 0;
    case AREA: {
        struct vcpu_runstate_info *area = &areas[cpu];
        return HC3(vcpu_op, VCPUOP_register_runstate_memory_area, cpu, &area);
    }
    case BRING_BACK:
        while (cpu_is_up(0))
            wait_a_little();
        return cpu_up(0) ? -1 : 77;
    case SEND_ALL:
        for (u32 i = 0; i < cpus; i++)
            if (i != cpu) {
                s64 rc = evtchn_port_op(EVTCHNOP_send, ipi[i]);
                if (rc)
                    return rc;
            }
        return 0;
    }
    return -ENOSYS;
}

static void worker(u64 arg)
{
    u32 cpu = this_cpu();
    started[cpu]++;
    if (arg != 0x1000 + cpu)
        started[cpu] = 1000;
    for (;;) {
        u32 what = command[cpu];
        if (what == IDLE) {                     /* blocked, so that 127 of these leave the CPU to one that works */
            poll_port(wake[cpu], 0);
            __atomic_fetch_and(&shared->pending[wake[cpu] / 64], ~(1ul << wake[cpu] % 64), __ATOMIC_SEQ_CST);
            continue;
        }
        answer[cpu] = carry_out(cpu, what);
        command[cpu] = IDLE;
        __atomic_fetch_add(&done[cpu], 1, __ATOMIC_SEQ_CST);
    }
}

static void tell(u32 cpu, u32 what)
{
    command[cpu] = what;
    evtchn_port_op(EVTCHNOP_send, wake[cpu]);
}

#define AWAIT(cpu) CHECK(WAIT_FOR(command[cpu] == IDLE), "line %d: vCPU %u does not answer", __LINE__, cpu)

/* Before any other vCPU is up. */
static void errnos(void)
{
    static struct vcpu_guest_context bad;       /* as a vcpu_hvm_context it is as bad */
    struct vcpu_runstate_info r;
    struct { u64 mfn; u32 offset, reserved; } info = { virt_to_mfn(&bad), 0, 0 };
    struct { u64 timeout; u32 flags; } one = { now_ns() + MS, 0 };
    cpus = nr_cpus();
    CHECK(cpus > 1, "this guest wants more than one vCPU, there are %u", cpus);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_initialise, cpus, &bad), -ENOENT);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_up, cpus, 0), -ENOENT);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_down, cpus, 0), -ENOENT);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_is_up, 0xffffffff, 0), -ENOENT);
    CHECK_EQ(bind_ipi(cpus), -ENOENT);
    CHECK_EQ(bind_virq(VIRQ_TIMER, cpus), -ENOENT);
    CHECK_EQ(cpu_up(1), -EINVAL);               /* not initialised */
    CHECK_EQ(cpu_is_up(1), 0);
    CHECK_EQ(cpu_is_up(0), 1);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_initialise, 0, &bad), -EEXIST);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_initialise, 1, 1ul << 45), -EFAULT);
    if (cpus > 32)
        CHECK_EQ(HC3(vcpu_op, VCPUOP_initialise, 32, &bad), -EINVAL);   /* no vcpu_info yet */
    CHECK_EQ(HC3(vcpu_op, VCPUOP_initialise, 1, &bad), -EINVAL);        /* no page tables */
    CHECK_EQ(HC3(vcpu_op, VCPUOP_set_singleshot_timer, 1, &one), -EINVAL);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_stop_singleshot_timer, 1, 0), -EINVAL);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_send_nmi, 1, 1), -EINVAL);
    info.offset = 4096 - 63;
    CHECK_EQ(HC3(vcpu_op, VCPUOP_register_vcpu_info, 1, &info), -EINVAL);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_get_runstate_info, 1, &r), 0);
    CHECK_EQ(r.state, RUNSTATE_offline);
    CHECK_EQ(HC3(vcpu_op, 99, 0, 0), -ENOSYS);
    CHECK_EQ(cpu_is_up(1), 0);
}

static void bring_up(void)
{
    event_hook = hook;
    cpu_nmi_handler(on_nmi);
    vcpu_infos[0] = vcpu0;
    for (u32 cpu = 0; cpu < cpus; cpu++) {
        s64 port = bind_ipi(cpu);
        CHECK(port > 0, "bind_ipi(%u): %ld", cpu, port);
        ipi[cpu] = (u32)port;
        port = bind_ipi(cpu);
        CHECK(port > 0, "bind_ipi(%u): %ld", cpu, port);
        wake[cpu] = (u32)port;
        mask_port(wake[cpu], 1);
    }
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        CHECK_EQ(cpu_initialise(cpu, worker, 0x1000 + cpu), 0);
        CHECK_EQ(cpu_initialise(cpu, worker, 0x1000 + cpu), -EEXIST);
        CHECK_EQ(cpu_is_up(cpu), 0);
        CHECK_EQ(started[cpu], 0);
        CHECK_EQ(cpu_up(cpu), 0);
        CHECK_EQ(cpu_up(cpu), 0);               /* is up: no harm */
        CHECK_EQ(cpu_is_up(cpu), 1);
    }
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        CHECK(WAIT_FOR(started[cpu]), "vCPU %u does not start", cpu);
        CHECK_EQ(started[cpu], 1);
        tell(cpu, SELF);
        AWAIT(cpu);
        CHECK_EQ(answer[cpu], cpu);
    }
}

/* To a vCPU that blocks, polls, computes, computes deaf. */
static void ipis(void)
{
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        static const u32 ways[] = { BLOCK, POLL, SPIN };
        for (u32 way = 0; way < 3; way++) {
            u64 seen = event_count[ipi[cpu]];
            tell(cpu, ways[way]);
            u64 until = now_ns() + MS;
            while (now_ns() < until)
                wait_a_little();
            CHECK(command[cpu] == ways[way], "vCPU %u did not wait (way %u)", cpu, way);
            CHECK_EQ(evtchn_port_op(EVTCHNOP_send, ipi[cpu]), 0);
            AWAIT(cpu);
            CHECK(answer[cpu] >= 1, "vCPU %u way %u: %ld", cpu, way, answer[cpu]);
            CHECK_EQ(event_count[ipi[cpu]], seen + 1);
            CHECK_EQ(upcall_cpu[ipi[cpu]], cpu + 1);
        }
        argument = 1;
        tell(cpu, SPIN_OFF);
        u64 seen = event_count[ipi[cpu]];
        CHECK_EQ(evtchn_port_op(EVTCHNOP_send, ipi[cpu]), 0);
        u64 until = now_ns() + MS;
        while (now_ns() < until)
            wait_a_little();
        CHECK_EQ(event_count[ipi[cpu]], seen);  /* it is deaf */
        argument = 0;
        AWAIT(cpu);
        CHECK_EQ(event_count[ipi[cpu]], seen);
        tell(cpu, BLOCK);                       /* and now it hears it */
        AWAIT(cpu);
        CHECK_EQ(event_count[ipi[cpu]], seen + 1);
    }
}

/* Everyone to everyone: each port is told at least once, nothing is lost for good. */
static void ipi_storm(void)
{
    for (u32 cpu = 1; cpu < cpus; cpu++)
        tell(cpu, SEND_ALL);
    for (u32 cpu = 1; cpu < cpus; cpu++)
        AWAIT(cpu);
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        CHECK_EQ(answer[cpu], 0);
        if (cpus > 2) {
            tell(cpu, BLOCK);                   /* an event is pending already */
            AWAIT(cpu);
        }
    }
    u64 seen = event_count[ipi[0]];
    events_on();
    CHECK(WAIT_FOR(event_count[ipi[0]] > 0), "no IPI to vCPU 0");
    events_off();
    CHECK(event_count[ipi[0]] >= seen, "lost");
}

/* An interdomain or unbound port moves from vCPU to vCPU; IPIs and per-vCPU VIRQs do not. */
static void moving_ports(void)
{
    struct { u16 dom, remote; u32 port; } alloc = { DOMID_SELF, DOMID_SELF, 0 };
    struct { u16 remote; u32 remote_port, port; } bind = { DOMID_SELF, 0, 0 };
    struct { u32 port, vcpu; } move = { 0, 1 };
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_alloc_unbound, &alloc), 0);
    bind.remote_port = alloc.port;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_bind_interdomain, &bind), 0);
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        u64 seen = event_count[alloc.port];
        move.port = alloc.port;
        move.vcpu = cpu;
        CHECK_EQ(HC2(event_channel_op, EVTCHNOP_bind_vcpu, &move), 0);
        port_cpu[alloc.port] = (u8)cpu;
        tell(cpu, BLOCK);
        CHECK_EQ(evtchn_port_op(EVTCHNOP_send, bind.port), 0);
        CHECK(WAIT_FOR(event_count[alloc.port] == seen + 1), "vCPU %u did not get the event", cpu);
        CHECK_EQ(upcall_cpu[alloc.port], cpu + 1);
        evtchn_port_op(EVTCHNOP_send, ipi[cpu]);
        AWAIT(cpu);
    }
    move.vcpu = cpus;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_bind_vcpu, &move), -ENOENT);
    move.port = ipi[1];
    move.vcpu = 0;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_bind_vcpu, &move), -EINVAL);
    evtchn_port_op(EVTCHNOP_close, bind.port);
    evtchn_port_op(EVTCHNOP_close, alloc.port);
}

static u64 page_a[512] PAGE_ALIGNED = { 0xaaaa }, page_b[512] PAGE_ALIGNED = { 0xbbbb };
static u64 view[512] PAGE_ALIGNED = { 1 };

#ifdef PVH
/* The page table entry changes, then HVMOP_flush_tlbs, or an IPI whose handler flushes. */
static void shoot_down(void)
{
    u64 home = virt_to_mfn(view);
    window = view;
    for (u32 way = 0; way < 4; way++) {
        u64 old = way % 2 ? 0xbbbb : 0xaaaa;
        CHECK_EQ(remap(view, virt_to_mfn(way % 2 ? page_b : page_a) * PAGE_SIZE | PTE_KERNEL_RW), 0);
        CHECK_EQ(HC2(hvm_op, HVMOP_flush_tlbs, 0), 0);
        argument = 1;
        for (u32 cpu = 1; cpu < cpus; cpu++) {
            answer[cpu] = 0;
            tell(cpu, READ);
        }
        for (u32 cpu = 1; cpu < cpus; cpu++)
            CHECK(WAIT_FOR((u64)answer[cpu] == old), "vCPU %u reads %lx", cpu, answer[cpu]);
        CHECK_EQ(remap(view, virt_to_mfn(way % 2 ? page_a : page_b) * PAGE_SIZE | PTE_KERNEL_RW), 0);
        if (way < 2)
            CHECK_EQ(HC2(hvm_op, HVMOP_flush_tlbs, 0), 0);
        else {
            flush_on_ipi = view;
            for (u32 cpu = 1; cpu < cpus; cpu++)
                CHECK_EQ(evtchn_port_op(EVTCHNOP_send, ipi[cpu]), 0);
        }
        for (u32 cpu = 1; cpu < cpus; cpu++) {
            CHECK(WAIT_FOR(command[cpu] == IDLE), "way %u: vCPU %u reads the old page", way, cpu);
            CHECK_EQ(answer[cpu], old ^ 0xaaaa ^ 0xbbbb);
        }
        flush_on_ipi = 0;
        argument = 0;
    }
    CHECK_EQ(HC2(hvm_op, HVMOP_flush_tlbs, 1), -EINVAL);
    CHECK_EQ(remap(view, home * PAGE_SIZE | PTE_KERNEL_RW), 0);
    CHECK_EQ(HC2(hvm_op, HVMOP_flush_tlbs, 0), 0);
}
#else
static s64 flush_op(u32 cmd, u64 arg1, u64 arg2)
{
    struct mmuext_op op = { cmd, 0, arg1, arg2 };
    return HC4(mmuext_op, &op, 1, 0, DOMID_SELF);
}

/* Other vCPUs read through a mapping in a loop; each kind of flush must make them see the new one. */
static void shoot_down(void)
{
    u64 mask[2] = { ~0ul, ~0ul };
    u64 home = virt_to_mfn(view);
    window = view;
    for (u32 way = 0; way < 7; way++) {
        u64 expected = way % 2 ? 0xaaaa : 0xbbbb;
        CHECK_EQ(remap(view, virt_to_mfn(way % 2 ? page_b : page_a) * PAGE_SIZE | PTE_KERNEL_RW), 0);
        CHECK_EQ(flush_op(MMUEXT_TLB_FLUSH_ALL, 0, 0), 0);
        argument = 1;
        for (u32 cpu = 1; cpu < cpus; cpu++) {
            answer[cpu] = 0;
            tell(cpu, READ);
        }
        for (u32 cpu = 1; cpu < cpus; cpu++)
            CHECK(WAIT_FOR((u64)answer[cpu] == (way % 2 ? 0xbbbb : 0xaaaa)), "vCPU %u reads %lx", cpu, answer[cpu]);
        u64 pte = virt_to_mfn(way % 2 ? page_a : page_b) * PAGE_SIZE | PTE_KERNEL_RW;
        struct mmu_update update = { pte_maddr(view), pte };
        s64 rc = way < 4 ? HC4(mmu_update, &update, 1, 0, DOMID_SELF) : 0;
        CHECK_EQ(rc, 0);
        switch (way) {
        case 0: rc = flush_op(MMUEXT_TLB_FLUSH_ALL, 0, 0); break;
        case 1: rc = flush_op(MMUEXT_INVLPG_ALL, (u64)view, 0); break;
        case 2: rc = flush_op(MMUEXT_TLB_FLUSH_MULTI, 0, (u64)mask); break;
        case 3: rc = flush_op(MMUEXT_INVLPG_MULTI, (u64)view, (u64)mask); break;
        case 4: rc = HC3(update_va_mapping, view, pte, UVMF_INVLPG | UVMF_ALL); break;
        case 5: rc = HC3(update_va_mapping, view, pte, UVMF_TLB_FLUSH | UVMF_ALL); break;
        default: rc = HC3(update_va_mapping, view, pte, UVMF_INVLPG | (u64)mask); break;
        }
        CHECK_EQ(rc, 0);
        for (u32 cpu = 1; cpu < cpus; cpu++) {
            CHECK(WAIT_FOR(command[cpu] == IDLE), "way %u: vCPU %u reads the old page", way, cpu);
            CHECK_EQ(answer[cpu], expected);
        }
        argument = 0;
    }
    CHECK_EQ(remap(view, home * PAGE_SIZE | PTE_KERNEL_RW), 0);
    CHECK_EQ(flush_op(MMUEXT_TLB_FLUSH_ALL, 0, 0), 0);
    CHECK_EQ(flush_op(MMUEXT_TLB_FLUSH_MULTI, 0, 0x1000), -EINVAL);     /* no mask there */
    CHECK_EQ(flush_op(MMUEXT_INVLPG_MULTI, (u64)view, 0x1000), -EINVAL);
    CHECK_EQ(HC3(update_va_mapping, view, home * PAGE_SIZE | PTE_KERNEL_RW, UVMF_INVLPG | 0x1000), -EFAULT);
}

/* A page table that a vCPU changes by plain stores. */
static void writable_tables(void)
{
    CHECK_EQ(HC2(vm_assist, 0, 2), 0);          /* VMASST_CMD_enable, writable_pagetables */
    volatile u64 *entry = pte_of(view);
    u64 old = *entry;
    for (u32 i = 0; i < 20; i++) {
        *entry = virt_to_mfn(i % 2 ? page_a : page_b) * PAGE_SIZE | PTE_KERNEL_RW;
        CHECK_EQ(flush_op(MMUEXT_INVLPG_ALL, (u64)view, 0), 0);
        argument = 0;                           /* READ looks once */
        for (u32 cpu = 1; cpu < cpus; cpu++)
            tell(cpu, READ);
        for (u32 cpu = 1; cpu < cpus; cpu++) {
            AWAIT(cpu);
            CHECK_EQ(answer[cpu], i % 2 ? 0xaaaa : 0xbbbb);
        }
    }
    *entry = old;
    CHECK_EQ(flush_op(MMUEXT_INVLPG_ALL, (u64)view, 0), 0);
}
#endif

static void timers(void)
{
    for (u32 cpu = 1; cpu < cpus; cpu++)
        tell(cpu, TIMERS);
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        AWAIT(cpu);
        CHECK(answer[cpu] == 0, "vCPU %u: %ld", cpu, answer[cpu]);
        CHECK(bind_virq(VIRQ_TIMER, cpu) == -EEXIST, "bound twice");
    }
}

static void locks(void)
{
    counter = 0;
    for (u32 cpu = 1; cpu < cpus; cpu++)
        tell(cpu, LOCKS);
    for (u32 cpu = 1; cpu < cpus; cpu++)
        AWAIT(cpu);
    CHECK_EQ(counter, 300 * (cpus - 1));
}

/* A vCPU that computes beside others waits for its turn: steal time, in the area it registered. */
static void steal(void)
{
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        tell(cpu, AREA);
        AWAIT(cpu);
        CHECK_EQ(answer[cpu], 0);
    }
    u64 before = areas[1].time[RUNSTATE_runnable];
    argument = 1;
    for (u32 cpu = 1; cpu < cpus; cpu++)
        tell(cpu, SPIN_OFF);
    u64 end = now_ns() + 5000 * MS;
    while (now_ns() < end && areas[1].time[RUNSTATE_runnable] - before < 5 * MS)
        wait_a_little();
    argument = 0;
    CHECK(areas[1].time[RUNSTATE_runnable] - before >= 5 * MS, "no time stolen: %lu",
          areas[1].time[RUNSTATE_runnable] - before);
    for (u32 cpu = 1; cpu < cpus; cpu++)
        AWAIT(cpu);
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        struct vcpu_runstate_info r;
        CHECK_EQ(HC3(vcpu_op, VCPUOP_get_runstate_info, cpu, &r), 0);
        CHECK(r.state == RUNSTATE_runnable || r.state == RUNSTATE_blocked, "vCPU %u is in state %u", cpu, r.state);
        for (u32 i = 0; i < 4; i++)
            CHECK(r.time[i] >= areas[cpu].time[i], "time %u went back", i);
        CHECK(r.time[0] && r.time[1], "never ran or never waited");
        CHECK(areas[cpu].state <= RUNSTATE_offline && areas[cpu].state_entry_time <= now_ns(), "bad area");
    }
}

static void nmi(void)
{
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        argument = 1;
        tell(cpu, SPIN_OFF);                    /* NMIs come though events are off */
        CHECK_EQ(send_nmi(cpu), 0);
        CHECK(WAIT_FOR(nmis[cpu] == 1), "vCPU %u got %u NMIs", cpu, nmis[cpu]);
        argument = 0;
        AWAIT(cpu);
        tell(cpu, BLOCK);
        u64 until = now_ns() + MS;
        while (now_ns() < until)
            wait_a_little();
        CHECK_EQ(send_nmi(cpu), 0);             /* and to one that blocks */
        CHECK(WAIT_FOR(nmis[cpu] == 2), "vCPU %u blocked through an NMI", cpu);
        evtchn_port_op(EVTCHNOP_send, ipi[cpu]);
        AWAIT(cpu);
    }
}

/* Down by itself and up again: it goes on after its hypercall, and finds what came meanwhile. */
static void down_and_up(void)
{
    for (u32 round = 0; round < 10; round++)
        for (u32 cpu = 1; cpu < cpus; cpu++) {
            struct vcpu_runstate_info r;
            u64 seen = event_count[ipi[cpu]];
            tell(cpu, DOWN);
            CHECK(WAIT_FOR(!cpu_is_up(cpu)), "vCPU %u does not go down", cpu);
            CHECK_EQ(HC3(vcpu_op, VCPUOP_get_runstate_info, cpu, &r), 0);
            CHECK(r.state == RUNSTATE_offline, "offline vCPU %u is in state %u", cpu, r.state);
            CHECK_EQ(evtchn_port_op(EVTCHNOP_send, ipi[cpu]), 0);
            CHECK_EQ(HC3(vcpu_op, VCPUOP_down, cpu, 0), 0);             /* is down: no harm */
            wait_a_little();
            CHECK_EQ(command[cpu], DOWN);
            CHECK_EQ(event_count[ipi[cpu]], seen);
            CHECK_EQ(cpu_up(cpu), 0);
            AWAIT(cpu);
            tell(cpu, BLOCK);
            AWAIT(cpu);
            CHECK_EQ(event_count[ipi[cpu]], seen + 1);
            CHECK_EQ(started[cpu], 1);
        }
}

/* Down by another, in the middle of anything. */
static void taken_down(void)
{
    for (u32 round = 0; round < 10; round++)
        for (u32 cpu = 1; cpu < cpus; cpu++) {
            argument = 1;
            tell(cpu, SPIN_OFF);
            CHECK_EQ(HC3(vcpu_op, VCPUOP_down, cpu, 0), 0);
            CHECK_EQ(cpu_is_up(cpu), 0);
            argument = 0;
            u64 until = now_ns() + MS;
            while (now_ns() < until)
                wait_a_little();
            CHECK(command[cpu] == SPIN_OFF, "vCPU %u ran while it was down", cpu);
            CHECK_EQ(cpu_up(cpu), 0);
            AWAIT(cpu);
        }
}

/* vCPU 0 is a vCPU like the others: another one may take its place and bring it back. */
static void without_zero(void)
{
    tell(1, BRING_BACK);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_down, 0, 0), 0);
    AWAIT(1);
    CHECK_EQ(answer[1], 77);
    CHECK_EQ(cpu_is_up(0), 1);
}

TESTS({ "errnos", errnos }, { "bring_up", bring_up }, { "ipis", ipis }, { "ipi_storm", ipi_storm },
      { "moving_ports", moving_ports },
      { "shoot_down", shoot_down },
#ifndef PVH
      { "writable_tables", writable_tables },
#endif
      { "timers", timers }, { "locks", locks }, { "steal", steal }, { "nmi", nmi }, { "down_and_up", down_and_up },
      { "taken_down", taken_down }, { "without_zero", without_zero });
