/* SPDX-License-Identifier: GPL-2.0-only */
/* Load for `seconds=`: every vCPU computes what it knows the result of, vCPU 0 plays ping-pong by IPI with each of the
   others in turn, and takes them down and brings them up again. Ends with a line of figures:
   RESULT seconds=.. errors=.. work=a,b,c,.. pingpong=.. median_ns=.. p99_ns=.. idle_median_ns=.. cycles=.. */
#include "guest.h"

#define MS 1000000ul
#define MAX_SAMPLES 65536

static u32 cpus;
static volatile u32 ending, errors, loaded;
static volatile u64 work_done[MAX_CPUS];
static volatile u32 go_down[MAX_CPUS], came_back[MAX_CPUS];
static u32 ping[MAX_CPUS], pong;
static volatile u64 pongs;
static u32 samples[MAX_SAMPLES];

/* A chain whose end is known: `length` steps from a seed, and the same backwards. */
static u64 forward(u64 x, u32 length)
{
    for (u32 i = 0; i < length; i++)
        x = x * 0x5851f42d4c957f2dul + 0x14057b7ef767814ful;
    return x;
}

static u64 backward(u64 x, u32 length)
{
    for (u32 i = 0; i < length; i++)
        x = (x - 0x14057b7ef767814ful) * 0xc097ef87329e28a5ul;
    return x;
}

static u32 primes_below(u8 *sieve, u32 limit)
{
    u32 found = 0;
    memset(sieve, 0, limit);
    for (u32 i = 2; i < limit; i++) {
        if (sieve[i])
            continue;
        found++;
        for (u32 j = 2 * i; j < limit; j += i)
            sieve[j] = 1;
    }
    return found;
}

static u8 sieves[MAX_CPUS][4096];

static void error(const char *what, u64 got)
{
    __atomic_fetch_add(&errors, 1, __ATOMIC_SEQ_CST);
    print("ERROR vCPU %u: %s %lx\n", this_cpu(), what, got);
}

static void one_piece(u32 cpu, u64 n)
{
    u64 seed = n << 8 | cpu, end = forward(seed, 20000);
    if (backward(end, 20000) != seed)
        error("the chain does not lead back:", backward(end, 20000));
    u32 primes = primes_below(sieves[cpu], 4096);
    if (primes != 564)
        error("primes below 4096:", primes);
    work_done[cpu]++;
}

/* The ping arrives in the middle of whatever the vCPU computes: answer at once. */
static void hook(u32 port, struct regs *regs)
{
    if (port == pong)
        pongs++;
    else if (port == ping[this_cpu()])
        evtchn_port_op(EVTCHNOP_send, pong);
}

static void worker(u64 arg)
{
    u32 cpu = this_cpu();
    (void)arg;
    events_on();
    for (u64 n = 0; !ending; n++) {
        if (loaded)
            one_piece(cpu, n);
        else {
            events_off();
            if (!loaded)
                block();                        /* until a ping */
            events_on();
        }
        if (go_down[cpu]) {
            go_down[cpu] = 0;
            cpu_down();
            came_back[cpu]++;
        }
    }
    events_off();
    cpu_down();
}

/* One round trip in ns, 0 if none came. */
static u64 play(u32 cpu)
{
    u64 seen = pongs, start = now_ns(), end = start + 5000 * MS;
    if (evtchn_port_op(EVTCHNOP_send, ping[cpu]))
        return 0;
    while (pongs == seen && now_ns() < end)
        block();
    return pongs == seen ? 0 : now_ns() - start;
}

static void sort(u32 *a, u32 n)
{
    for (u32 gap = n / 2; gap; gap /= 2)
        for (u32 i = gap; i < n; i++) {
            u32 v = a[i], j = i;
            for (; j >= gap && a[j - gap] > v; j -= gap)
                a[j] = a[j - gap];
            a[j] = v;
        }
}

static u32 measured;

static void measure(u32 rounds)
{
    for (u32 i = 0; i < rounds && cpus > 1; i++) {
        u64 ns = play(1 + i % (cpus - 1));
        if (!ns)
            error("no pong from", 1 + i % (cpus - 1));
        else if (measured < MAX_SAMPLES)
            samples[measured++] = ns > 0xffffffff ? 0xffffffff : (u32)ns;
    }
}

static u32 cycle(u32 cpu)
{
    u32 back = came_back[cpu];
    go_down[cpu] = 1;
    if (!WAIT_FOR(!cpu_is_up(cpu))) {
        error("does not go down:", cpu);
        return 0;
    }
    u64 work = work_done[cpu];
    for (u32 i = 0; i < 20; i++)
        wait_a_little();
    if (work_done[cpu] != work)
        error("works while it is down:", cpu);
    if (cpu_up(cpu) || !WAIT_FOR(came_back[cpu] == back + 1)) {
        error("does not come back:", cpu);
        return 0;
    }
    return 1;
}

static void load(void)
{
    u64 seconds = cmdline_number("seconds", 2), start = now_ns();
    u32 cycles = 0, idle_median = 0;
    cpus = nr_cpus();
    event_hook = hook;
    HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0);
    pong = (u32)bind_ipi(0);
    for (u32 cpu = 1; cpu < cpus; cpu++) {
        ping[cpu] = (u32)bind_ipi(cpu);
        CHECK_EQ(cpu_start(cpu, worker, 0), 0);
    }
    measure(400);                               /* nothing else to do */
    if (measured) {
        sort(samples, measured);
        idle_median = samples[measured / 2];
        measured = 0;
    }
    loaded = 1;
    for (u32 cpu = 1; cpu < cpus; cpu++)
        play(cpu);                              /* out of their wait */
    for (u64 n = 0; now_ns() - start < seconds * 1000 * MS; n++) {
        one_piece(0, n);
        if (cpus == 1)
            continue;
        measure(20);
        cycles += cycle((u32)(1 + n % (cpus - 1)));
    }
    ending = 1;
    for (u32 cpu = 1; cpu < cpus; cpu++)
        if (!WAIT_FOR(!cpu_is_up(cpu)))
            error("does not end:", cpu);
    sort(samples, measured);
    print("RESULT seconds=%lu errors=%u work=", (now_ns() - start) / (1000 * MS), errors);
    for (u32 cpu = 0; cpu < cpus; cpu++)
        print(cpu ? ",%lu" : "%lu", work_done[cpu]);
    print(" pingpong=%u median_ns=%u p99_ns=%u idle_median_ns=%u cycles=%u\n", measured,
          measured ? samples[measured / 2] : 0, measured ? samples[measured - 1 - measured / 100] : 0, idle_median,
          cycles);
    CHECK_EQ(errors, 0);
    for (u32 cpu = 0; cpu < cpus; cpu++)
        CHECK(work_done[cpu] > 0, "vCPU %u did nothing", cpu);
    if (cpus > 1)
        CHECK(cycles > 0 && measured > 0, "%u cycles, %u round trips", cycles, measured);
}

TESTS({ "load", load });
