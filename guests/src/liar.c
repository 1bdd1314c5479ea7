/* SPDX-License-Identifier: GPL-2.0-only */
/* Every hypercall with hostile arguments, `rounds` times, from a generator that `seed` (both on the command line)
   determines. With wild=1 also those that can make this guest unable to go on, and with wild=2 those that surely will:
   then its own crash is a fair end. */
#include "guest.h"

static u64 state;
static u8 scratch[4 * PAGE_SIZE] PAGE_ALIGNED = { 1 };

static u64 random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static u64 a_frame(void)
{
    switch (random() % 6) {
    case 0: return virt_to_mfn(scratch + random() % 4 * PAGE_SIZE);
    case 1: return virt_to_mfn((void *)start_info->pt_base);
    case 2: return random() % 64;
    case 3: return start_info->shared_info / PAGE_SIZE;
    case 4: return ((u64 *)start_info->mfn_list)[random() % start_info->nr_pages];
    default: return random() >> random() % 64;
    }
}

static u64 a_value(void)
{
    static const u64 edges[] = { 0, 1, 2, 3, 7, 8, 63, 64, 255, 4095, 4096, 0x7ff0, 0x7ff1, 0x7ff2, 0x7ff4, 0x7fff,
                                 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000, 0x7fffffffffff, 0x800000000000,
                                 0x7fffffffffffffff, 0x8000000000000000, 0xffff800000000000, 0xffff820000000000,
                                 0xffff87ffffffffff, 0xffff880000000000, 0xfffffffffffff000, ~0ul };
    switch (random() % 8) {
    case 0: return edges[random() % ARRAY_SIZE(edges)];
    case 1: return (u64)scratch + random() % sizeof(scratch);
    case 2: return (u64)scratch + (random() % sizeof(scratch) & ~7ul);
    case 3: return a_frame();
    case 4: return a_frame() * PAGE_SIZE | (random() & 0xfff);
    case 5: return random() % 32;
    case 6: return random();
    default: return -(random() % 32);
    }
}

/* What scratch holds when Xen reads an argument from it. */
static void fill(void)
{
    u64 *words = (u64 *)scratch;
    u32 *halves = (u32 *)scratch;
    u32 start = random() % (sizeof(scratch) / 8 - 64);
    for (u32 i = 0; i < 64; i++) {
        if (random() % 2)
            words[start + i] = a_value();
        else {
            halves[(start + i) * 2] = (u32)a_value();
            halves[(start + i) * 2 + 1] = (u32)a_value();
        }
    }
    words[0] = words[start];
}

/* How bold one must be for a hypercall: 2 ends the guest soon, 1 may. */
static u64 wildness(u64 nr, const u64 *a)
{
    switch (nr) {
    case HC_set_trap_table: case HC_iret: case 6 /* sched_op_compat */:
        return 2;
    case HC_sched_op:
        return (u32)a[0] == SCHEDOP_yield ? 0 : 2;
    case HC_stack_switch: case HC_set_callbacks: case HC_callback_op: case HC_set_segment_base:
    case HC_multicall: case HC_set_debugreg: case HC_set_gdt: case HC_update_descriptor:
    case HC_mmu_update: case HC_mmuext_op: case HC_update_va_mapping: case 22: case HC_memory_op:
        return 1;
    case HC_vcpu_op:
        return (u32)a[0] == VCPUOP_down || (u32)a[0] == VCPUOP_register_vcpu_info ||
               (u32)a[0] == VCPUOP_register_runstate_memory_area || (u32)a[0] >= 11;
    case HC_grant_table_op:
        return (u32)a[0] == GNTTABOP_map || (u32)a[0] == GNTTABOP_copy || (u32)a[0] == 4;
    case HC_event_channel_op:
        return (u32)a[0] == EVTCHNOP_close || (u32)a[0] == EVTCHNOP_reset;     /* our console's port */
    case HC_event_channel_op_compat:
        return 1;
    }
    return 0;
}

static u64 calls, refused;

static void call(u64 nr)
{
    u64 a[5];
    for (u32 i = 0; i < 5; i++)
        a[i] = a_value();
    if (random() % 2)
        a[0] = random() % 20;                   /* most first arguments are commands */
    if (nr != HC_sched_op && random() % 2)
        a[1] = (u64)scratch + (random() % 8) * 8;
    a[2] = nr == HC_grant_table_op || nr == HC_mmuext_op ? random() % 8 : a[2];
    if (wildness(nr, a) > cmdline_number("wild", 0))
        return;
    calls++;
    if (syscall5(nr, a[0], a[1], a[2], a[3], a[4]) < 0)
        refused++;
}

static void lies(void)
{
    u64 rounds = cmdline_number("rounds", 2000);
    state = cmdline_number("seed", 1) * 0x9e3779b97f4a7c15ul + 1;
    for (u64 i = 0; i < rounds; i++) {
        fill();
        s64 vector = catch_trap(call, random() % 66);
        CHECK(vector == -1, "trap %ld at %lx after %lu calls", vector, caught.rip, calls);
    }
    CHECK(refused > calls / 4, "only %lu of %lu calls were refused", refused, calls);
}

/* After all that the guest still works. */
static void still_sane(void)
{
    CHECK_EQ(HC2(xen_version, XENVER_version, 0), 4 << 16 | 6);
    s64 port = bind_ipi(0);
    CHECK(port > 0 || port == -ENOSPC, "bind_ipi: %ld", port);
    for (u64 pfn = 0; pfn < start_info->nr_pages; pfn++)
        if (M2P[((u64 *)start_info->mfn_list)[pfn]] != pfn) {
            test_fail("pfn %lx is no longer ours", pfn);
            return;
        }
}

TESTS({ "lies", lies }, { "still_sane", still_sane });
