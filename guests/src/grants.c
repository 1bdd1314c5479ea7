/* SPDX-License-Identifier: GPL-2.0-only */
/* Grant tables, version 1, as one guest alone can use them: it grants to itself. */
#include "guest.h"

#define HOST_MAP 2
#define READONLY 4
#define CONTAINS_PTE 16
#define PERMIT 1
#define GTF_READONLY 4
#define GTF_READING 8
#define GTF_WRITING 16

static struct grant_entry entries[512] PAGE_ALIGNED = { { 1, 0, 0 } };
static u8 granted[PAGE_SIZE] PAGE_ALIGNED = { 1 }, window[PAGE_SIZE] PAGE_ALIGNED = { 1 };
static u64 window_pte;
static u16 own_domid;

static NOINLINE void write_window(u64 value) { *(volatile u64 *)window = value; }

static s64 map(u32 ref, u32 flags, u64 addr, struct gnttab_map *op)
{
    *op = (struct gnttab_map){ addr, flags, ref, DOMID_SELF, 99, 0, 0 };
    s64 rc = HC3(grant_table_op, GNTTABOP_map, op, 1);
    return rc ? rc : op->status;
}

static s64 unmap(u32 handle, u64 addr)
{
    struct gnttab_unmap op = { addr, 0, handle, 99 };
    s64 rc = HC3(grant_table_op, GNTTABOP_unmap, &op, 1);
    return rc ? rc : op.status;
}

static void setup(void)
{
    u64 frame = 0;
    struct gnttab_query q = { DOMID_SELF, 0, 0, 99 };
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_query_size, &q, 1), 0);
    CHECK_EQ(q.status, 0);
    CHECK(q.max_nr_frames >= 4, "at most %u frames", q.max_nr_frames);
    struct gnttab_setup s = { DOMID_SELF, 1, 99, &frame };
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_setup_table, &s, 1), 0);
    CHECK_EQ(s.status, 0);
    CHECK_EQ(remap(entries, frame * PAGE_SIZE | PTE_KERNEL_RW), 0);
    s.nr_frames = q.max_nr_frames + 1;
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_setup_table, &s, 1), 0);
    CHECK_EQ(s.status, -1);
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_setup_table, &s, 2), -EINVAL);
    window_pte = virt_to_mfn(window) * PAGE_SIZE | PTE_KERNEL_RW;
    /* An event channel to itself says which domain this is. */
    struct { u16 dom, remote; u32 port; } unbound = { DOMID_SELF, DOMID_SELF, 0 };
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_alloc_unbound, &unbound), 0);
    struct { u16 dom, pad; u32 port, status, vcpu, u[2]; } status = { DOMID_SELF, 0, unbound.port, 0, 0, { 0, 0 } };
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_status, &status), 0);
    own_domid = status.u[0];
    CHECK_EQ(evtchn_port_op(EVTCHNOP_close, unbound.port), 0);
}

static void grant(u32 ref, u64 mfn, u16 flags)
{
    entries[ref].domid = own_domid;
    entries[ref].frame = mfn;
    barrier();
    entries[ref].flags = PERMIT | flags;
}

static void map_and_unmap(void)
{
    struct gnttab_map op;
    grant(8, virt_to_mfn(granted), 0);
    for (u32 i = 0; i < 20; i++) {
        CHECK_EQ(map(8, HOST_MAP, (u64)window, &op), 0);
        CHECK_EQ(op.bus, virt_to_mfn(granted) * PAGE_SIZE);
        CHECK_EQ(entries[8].flags, PERMIT | GTF_READING | GTF_WRITING);
        *(volatile u64 *)window = i;
        CHECK_EQ(*(volatile u64 *)granted, i);
        CHECK_EQ(unmap(op.handle, (u64)window), 0);
        CHECK_EQ(entries[8].flags, PERMIT);
        CHECK_EQ(catch_trap(write_window, 1), 14);
        CHECK_EQ(unmap(op.handle, (u64)window), -4);
    }
    CHECK_EQ(remap(window, window_pte), 0);
    entries[8].flags = 0;
}

static void read_only(void)
{
    struct gnttab_map op;
    grant(9, virt_to_mfn(granted), GTF_READONLY);
    CHECK_EQ(map(9, HOST_MAP, (u64)window, &op), -1);
    CHECK_EQ(map(9, HOST_MAP | READONLY, (u64)window, &op), 0);
    CHECK_EQ(entries[9].flags, PERMIT | GTF_READONLY | GTF_READING);
    *(volatile u64 *)granted = 0x1234;
    CHECK_EQ(*(volatile u64 *)window, 0x1234);
    CHECK_EQ(catch_trap(write_window, 1), 14);
    CHECK_EQ(caught.error, 3);
    CHECK_EQ(unmap(op.handle, (u64)window), 0);
    CHECK_EQ(remap(window, window_pte), 0);
    entries[9].flags = 0;
}

static void map_by_pte(void)
{
    struct gnttab_map op;
    u64 pte = pte_maddr(window);
    grant(10, virt_to_mfn(granted), 0);
    CHECK_EQ(map(10, HOST_MAP | CONTAINS_PTE, pte, &op), 0);
    *(volatile u64 *)window = 0x77;
    CHECK_EQ(*(volatile u64 *)granted, 0x77);
    CHECK_EQ(unmap(op.handle, pte), 0);
    CHECK_EQ(map(10, HOST_MAP | CONTAINS_PTE, pte + 4, &op), -1);
    CHECK_EQ(map(10, HOST_MAP | CONTAINS_PTE, virt_to_mfn(granted) * PAGE_SIZE, &op), -1);
    CHECK_EQ(map(10, HOST_MAP, 0xffff830000000000, &op), -1);
    CHECK_EQ(map(10, HOST_MAP, 0x123456789000, &op), -1);
    CHECK_EQ(entries[10].flags, PERMIT);
    CHECK_EQ(remap(window, window_pte), 0);
    entries[10].flags = 0;
}

static void bad_grants(void)
{
    struct gnttab_map op;
    CHECK_EQ(map(511, HOST_MAP, (u64)window, &op), -1);                 /* not granted */
    CHECK_EQ(map(0xfffffff, HOST_MAP, (u64)window, &op), -3);
    CHECK_EQ(map(8, 0, (u64)window, &op), -3);
    grant(11, 1, 0);                                                    /* Xen's frame */
    CHECK_EQ(map(11, HOST_MAP, (u64)window, &op), -9);
    grant(11, 0xffffffff, 0);
    CHECK_EQ(map(11, HOST_MAP, (u64)window, &op), -9);
    grant(11, virt_to_mfn((void *)start_info->pt_base), 0);             /* a page table, writable */
    CHECK_EQ(map(11, HOST_MAP, (u64)window, &op), -1);
    grant(11, virt_to_mfn(granted), 0);
    entries[11].domid = own_domid + 1;
    CHECK_EQ(map(11, HOST_MAP, (u64)window, &op), -1);
    entries[11].flags = 0;
    op = (struct gnttab_map){ (u64)window, HOST_MAP, 8, 4711, 99, 0, 0 };
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_map, &op, 1), 0);
    CHECK_EQ(op.status, -2);
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_map, 0x1000, 1), -EFAULT);
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_map, &op, 0x80000000), -EINVAL);
    CHECK_EQ(HC3(grant_table_op, 77, &op, 1), -ENOSYS);
    *(volatile u64 *)window = 5;                                        /* still our own page */
    CHECK_EQ(*pte_of(window) & ~0xffful & 0xfffffffffffff, virt_to_mfn(window) * PAGE_SIZE);
}

static void copy(void)
{
    memset(granted, 0, PAGE_SIZE);
    memcpy(window, "copied text", 12);
    grant(12, virt_to_mfn(granted), 0);
    struct gnttab_copy op = { { virt_to_mfn(window), DOMID_SELF, 0 }, { 12, DOMID_SELF, 100 }, 12, 2, 99 };
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_copy, &op, 1), 0);
    CHECK_EQ(op.status, 0);
    CHECK(!memcmp(granted + 100, "copied text", 12), "not copied");
    CHECK_EQ(entries[12].flags, PERMIT);
    op.dest.offset = 4090;
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_copy, &op, 1), 0);
    CHECK_EQ(op.status, -10);
    op = (struct gnttab_copy){ { virt_to_mfn(window), DOMID_SELF, 0 },
                               { virt_to_mfn((void *)start_info->pt_base), DOMID_SELF, 0 }, 8, 0, 99 };
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_copy, &op, 1), 0);
    CHECK_EQ(op.status, -1);
    op = (struct gnttab_copy){ { 1, DOMID_SELF, 0 }, { virt_to_mfn(window), DOMID_SELF, 0 }, 8, 0, 99 };
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_copy, &op, 1), 0);
    CHECK_EQ(op.status, -9);
    entries[12].flags = 0;
}

static void version(void)
{
    u32 v = 1;
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_set_version, &v, 1), 0);
    v = 2;
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_set_version, &v, 1), -ENOSYS);
    CHECK_EQ(v, 1);
    struct { u16 dom, pad; u32 version; } g = { DOMID_SELF, 0, 9 };
    CHECK_EQ(HC3(grant_table_op, GNTTABOP_get_version, &g, 1), 0);
    CHECK_EQ(g.version, 1);
}

TESTS({ "setup", setup }, { "map_and_unmap", map_and_unmap }, { "read_only", read_only },
      { "map_by_pte", map_by_pte }, { "bad_grants", bad_grants }, { "copy", copy }, { "version", version });
