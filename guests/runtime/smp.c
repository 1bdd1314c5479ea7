/* SPDX-License-Identifier: GPL-2.0-only */
/* Many vCPUs: what PV and PVH guests have in common. A vCPU's number is that of the stack it is on. */
#include "guest.h"

u8 cpu_stacks[MAX_CPUS][CPU_STACK_SIZE] __attribute__((aligned(CPU_STACK_SIZE)));
struct vcpu_info *vcpu_infos[MAX_CPUS];
static struct vcpu_info more_infos[MAX_CPUS] PAGE_ALIGNED;     /* of those beyond shared_info's */
static struct { void (*fn)(u64); u64 arg; } entries[MAX_CPUS];

s64 arch_cpu_initialise(u32 cpu, u64 stack);

u32 this_cpu(void)
{
    u64 offset = (u64)__builtin_frame_address(0) - (u64)cpu_stacks;
    return offset < sizeof(cpu_stacks) ? offset / CPU_STACK_SIZE : 0;
}

/* Where a new vCPU's assembly comes to, on its own stack. */
void __attribute__((noreturn)) cpu_main(void)
{
    u32 cpu = this_cpu();
    entries[cpu].fn(entries[cpu].arg);
    for (;;)
        cpu_down();
}

u32 nr_cpus(void)
{
    u32 n = 0;
    while (HC3(vcpu_op, VCPUOP_is_up, n, 0) >= 0)
        n++;
    return n;
}

static s64 place_info(u32 cpu)
{
    if (vcpu_infos[cpu])
        return 0;
    if (cpu < 32) {
        vcpu_infos[cpu] = &shared->vcpu[cpu];
        return 0;
    }
    struct vcpu_info *info = &more_infos[cpu];
    struct { u64 mfn; u32 offset, reserved; } op = { virt_to_mfn(info), (u64)info % PAGE_SIZE, 0 };
    s64 rc = HC3(vcpu_op, VCPUOP_register_vcpu_info, cpu, &op);
    if (!rc)
        vcpu_infos[cpu] = info;
    return rc;
}

s64 cpu_initialise(u32 cpu, void (*fn)(u64), u64 arg)
{
    if (cpu >= MAX_CPUS)
        return -EINVAL;
    s64 rc = place_info(cpu);
    if (rc)
        return rc;
    entries[cpu].fn = fn;
    entries[cpu].arg = arg;
    return arch_cpu_initialise(cpu, (u64)cpu_stacks[cpu] + CPU_STACK_SIZE);
}

s64 cpu_up(u32 cpu)
{
    return HC3(vcpu_op, VCPUOP_up, cpu, 0);
}

s64 cpu_start(u32 cpu, void (*fn)(u64), u64 arg)
{
    s64 rc = cpu_initialise(cpu, fn, arg);
    return rc ? rc : cpu_up(cpu);
}

void cpu_down(void)
{
    HC3(vcpu_op, VCPUOP_down, this_cpu(), 0);
}

int cpu_is_up(u32 cpu)
{
    return HC3(vcpu_op, VCPUOP_is_up, cpu, 0) == 1;
}

s64 send_nmi(u32 cpu)
{
    return HC3(vcpu_op, VCPUOP_send_nmi, cpu, 0);
}

s64 poll_port(u32 port, u64 until_ns)
{
    struct sched_poll p = { (u64)&port, 1, until_ns };
    return HC2(sched_op, SCHEDOP_poll, &p);
}

/* Events come on and the wait begins in one step: an event that comes before it ends it. */
void block(void)
{
#ifdef PVH
    __asm__ volatile("sti; hlt; cli" ::: "memory");
#else
    HC2(sched_op, SCHEDOP_block, 0);
    events_off();
#endif
}

void spin_lock(spinlock *lock)
{
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
        while (*lock)
            relax();
}

void yield_lock(spinlock *lock)
{
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
        wait_a_little();
}

void spin_unlock(spinlock *lock)
{
    __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}
