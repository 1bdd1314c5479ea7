/* SPDX-License-Identifier: GPL-2.0-only */
#include "guest.h"

volatile u64 event_count[4096];
void (*event_hook)(u32 port, struct regs *regs);
u8 port_cpu[4096];

/* The upcall: events are masked by Xen on entry; HYPERVISOR_iret restores the mask from the frame's IF. Each vCPU has
   its own selector, and a port is told to one vCPU only, but words of pending bits are shared: port_cpu says whose an
   event is. */
void event_c(struct regs *regs)
{
    u32 cpu = this_cpu();
    struct vcpu_info *info = vcpu_infos[cpu];
    do {
        *(volatile u8 *)&info->upcall_pending = 0;
        u64 words = __atomic_exchange_n(&info->pending_sel, 0, __ATOMIC_SEQ_CST);
        for (u32 w = 0; words; w++, words >>= 1) {
            if (!(words & 1))
                continue;
            u64 ready = shared->pending[w] & ~shared->mask[w];
            for (u32 b = 0; ready; b++, ready >>= 1) {
                if (!(ready & 1) || port_cpu[w * 64 + b] != cpu)
                    continue;
                __atomic_fetch_and(&shared->pending[w], ~(1ul << b), __ATOMIC_SEQ_CST);
                event_count[w * 64 + b]++;
                if (event_hook)
                    event_hook(w * 64 + b, regs);
            }
        }
    } while (*(volatile u8 *)&info->upcall_pending);
}

#ifdef PVH
void events_on(void)
{
    __asm__ volatile("sti; nop" ::: "memory");  /* the window opens behind the next instruction */
}

void events_off(void)
{
    __asm__ volatile("cli" ::: "memory");
}
#else
void events_on(void)
{
    struct vcpu_info *info = this_vcpu();
    *(volatile u8 *)&info->upcall_mask = 0;
    barrier();
    if (*(volatile u8 *)&info->upcall_pending)
        HC2(xen_version, XENVER_version, 0);    /* any hypercall lets Xen deliver */
}

void events_off(void)
{
    *(volatile u8 *)&this_vcpu()->upcall_mask = 1;
    barrier();
}
#endif

void mask_port(u32 port, int masked)
{
    if (masked)
        __atomic_fetch_or(&shared->mask[port / 64], 1ul << port % 64, __ATOMIC_SEQ_CST);
    else
        __atomic_fetch_and(&shared->mask[port / 64], ~(1ul << port % 64), __ATOMIC_SEQ_CST);
}

s64 bind_virq(u32 virq, u32 vcpu)
{
    struct { u32 virq, vcpu, port; } op = { virq, vcpu, 0 };
    s64 rc = HC2(event_channel_op, EVTCHNOP_bind_virq, &op);
    if (!rc)
        port_cpu[op.port & 4095] = (u8)vcpu;
    return rc ? rc : (s64)op.port;
}

s64 bind_ipi(u32 vcpu)
{
    struct { u32 vcpu, port; } op = { vcpu, 0 };
    s64 rc = HC2(event_channel_op, EVTCHNOP_bind_ipi, &op);
    if (!rc)
        port_cpu[op.port & 4095] = (u8)vcpu;
    return rc ? rc : (s64)op.port;
}

s64 evtchn_port_op(u32 cmd, u32 port)
{
    return HC2(event_channel_op, cmd, &port);
}

u64 now_ns(void)
{
    const struct vcpu_time_info *t = &vcpu0->time;
    u32 version;
    u64 ns;
    do {
        version = *(volatile u32 *)&t->version;
        barrier();
        u32 low, high;
        __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
        u64 delta = ((u64)high << 32 | low) - t->tsc_timestamp;
        delta = t->tsc_shift >= 0 ? delta << t->tsc_shift : delta >> -t->tsc_shift;
        ns = t->system_time + (u64)(((unsigned __int128)delta * t->tsc_to_system_mul) >> 32);
        barrier();
    } while (version & 1 || version != *(volatile u32 *)&t->version);
    return ns;
}
