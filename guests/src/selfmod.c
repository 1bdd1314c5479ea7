/* SPDX-License-Identifier: GPL-2.0-only */
/* Code that is rewritten and verified all the time: by the vCPU that runs it, in place and across a page boundary, and
   by another vCPU. `rounds=N` of each (0: for ever), `report=S` a line every S seconds. Whatever an engine remembers of
   old code shows as a wrong sum. */
#include "guest.h"

#define FUNCTIONS 64
#define SLOT 64                                 /* bytes a function has */

static u8 code[MAX_CPUS][2 * PAGE_SIZE] PAGE_ALIGNED;
static volatile u64 rounds_done[MAX_CPUS];
static volatile u32 finished[MAX_CPUS];
static volatile u64 wrong;
static u64 rounds;

/* mov $value, %eax; add $more, %eax; [jmp over a hole;] ret */
static u32 write_function(u8 *at, u32 value, u32 more, int hole)
{
    u32 n = 0;
    at[n++] = 0xb8;
    for (u32 i = 0; i < 4; i++)
        at[n++] = (u8)(value >> 8 * i);
    at[n++] = 0x05;
    for (u32 i = 0; i < 4; i++)
        at[n++] = (u8)(more >> 8 * i);
    if (hole) {
        at[n++] = 0xeb;
        at[n++] = 5;
        n += 5;
    }
    at[n++] = 0xc3;
    barrier();
    return value + more;
}

static u32 call(const u8 *at)
{
    u32 result;
    __asm__ volatile("call *%1" : "=a"(result) : "r"(at) : "memory", "cc");
    return result;
}

static void failed(u32 cpu, u64 round, u32 got, u32 wanted)
{
    wrong++;
    print("WRONG: vCPU %u round %lu: %x, not %x\n", cpu, round, got, wanted);
}

/* Own code: a page full of functions, one that lies across two pages, and one that changes itself while it runs. */
static void one_round(u32 cpu, u64 round)
{
    u8 *page = code[cpu];
    for (u32 i = 0; i < FUNCTIONS; i++) {
        u8 *at = page + i * SLOT % (PAGE_SIZE - SLOT);
        u32 wanted = write_function(at, (u32)round * 2654435761u + i, cpu << 16 | i, (round + i) & 1);
        u32 got = call(at);
        if (got != wanted)
            failed(cpu, round, got, wanted);
        at[1] ^= 0xff;                          /* one byte of it */
        got = call(at);
        wanted = (wanted - ((u32)round * 2654435761u + i)) + (((u32)round * 2654435761u + i) ^ 0xff);
        if (got != wanted)
            failed(cpu, round, got, wanted);
    }
    u8 *across = page + PAGE_SIZE - 7;
    u32 wanted = write_function(across, (u32)round, ~(u32)round ^ cpu, 0);
    u32 got = call(across);
    if (got != wanted)
        failed(cpu, round, got, wanted);
    /* mov $imm8, byte ptr [rip+1] ; mov al, 0 ; ret: the store changes the next instruction */
    u8 *self = page + PAGE_SIZE + 64;
    const u8 bytes[] = { 0xc6, 0x05, 1, 0, 0, 0, (u8)round, 0xb0, 0, 0x0f, 0xb6, 0xc0, 0xc3 };
    memcpy(self, bytes, sizeof(bytes));
    barrier();
    got = call(self);
    if (got != (u8)round)
        failed(cpu, round, got, (u8)round);
}

/* What its neighbour wrote, after the neighbour said so. */
static u8 shared_code[MAX_CPUS][PAGE_SIZE] PAGE_ALIGNED;
static volatile u32 promised[MAX_CPUS], posted[MAX_CPUS], taken[MAX_CPUS];

static void work(u64 arg)
{
    u32 cpu = this_cpu(), cpus = (u32)arg, next = (cpu + 1) % cpus;
    for (u64 round = 1; !rounds || round <= rounds; round++) {
        one_round(cpu, round);
        if (cpus > 1) {
            if (posted[next] == taken[next]) {  /* it has run what it got */
                promised[next] = write_function(shared_code[next] + posted[next] % 3 * 100, (u32)round * 40503u, next, 1);
                __atomic_fetch_add(&posted[next], 1, __ATOMIC_SEQ_CST);
            }
            if (posted[cpu] != taken[cpu]) {
                u32 got = call(shared_code[cpu] + taken[cpu] % 3 * 100);
                if (got != promised[cpu])
                    failed(cpu, round, got, promised[cpu]);
                __atomic_fetch_add(&taken[cpu], 1, __ATOMIC_SEQ_CST);
            }
        }
        rounds_done[cpu] = round;
    }
    finished[cpu] = 1;
}

static u64 total(u32 cpus)
{
    u64 sum = 0;
    for (u32 i = 0; i < cpus; i++)
        sum += rounds_done[i];
    return sum;
}

static void reporter(u64 arg)
{
    u64 period = cmdline_number("report", 1) * 1000000000ul, next = now_ns() + period;
    (void)arg;
    while (!finished[0]) {
        u32 port = 0;
        struct sched_poll p = { (u64)&port, 0, next };
        HC2(sched_op, SCHEDOP_poll, &p);
        if (now_ns() < next)
            continue;
        print("rounds %lu wrong %lu\n", total(nr_cpus()), wrong);
        next += period;
    }
}

static void selfmod(void)
{
    u32 cpus = nr_cpus(), workers = cpus > 1 ? cpus - 1 : 1;
    rounds = cmdline_number("rounds", 2000);
    /* The last vCPU only reports, when there is one to spare. */
    if (cpus > 1)
        CHECK_EQ(cpu_start(cpus - 1, reporter, 0), 0);
    for (u32 cpu = 1; cpu < workers; cpu++)
        CHECK_EQ(cpu_start(cpu, work, workers), 0);
    work(workers);
    for (u32 cpu = 1; cpu < workers; cpu++)
        CHECK(WAIT_FOR(finished[cpu]), "vCPU %u does not end", cpu);
    print("rounds %lu wrong %lu\n", total(cpus), wrong);
    CHECK_EQ(wrong, 0);
    CHECK_EQ(total(cpus), rounds * workers);
}

TESTS({ "selfmod", selfmod });
