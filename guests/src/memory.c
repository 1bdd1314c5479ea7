/* SPDX-License-Identifier: GPL-2.0-only */
/* Reservations: frames given back and taken again, and numbers that are no frames of ours. */
#include "guest.h"

static u8 page[PAGE_SIZE] PAGE_ALIGNED = { 1 };

static s64 reservation(u32 cmd, u64 *extents, u64 count, u32 order)
{
    struct memory_reservation r = { (u64)extents, count, order, 0, DOMID_SELF };
    return HC2(memory_op, cmd, &r);
}

static s64 domain_query(u32 cmd)
{
    u16 domid = DOMID_SELF;
    return HC2(memory_op, cmd, &domid);
}

static void queries(void)
{
    /* Xen counts the domain's frames, and shared_info is not one of them. */
    CHECK_EQ(domain_query(XENMEM_current_reservation), start_info->nr_pages);
    CHECK((u64)domain_query(XENMEM_maximum_reservation) >= start_info->nr_pages, "maximum below current");
    CHECK(HC2(memory_op, XENMEM_maximum_ram_page, 0) > (s64)start_info->nr_pages, "machine smaller than guest");
    struct { u64 v_start, v_end, max_mfn; } mapping;
    CHECK_EQ(HC2(memory_op, XENMEM_machphys_mapping, &mapping), 0);
    CHECK_EQ(mapping.v_start, (u64)M2P);
    CHECK(mapping.max_mfn > virt_to_mfn(page), "max_mfn %lx", mapping.max_mfn);
    CHECK_EQ(HC2(memory_op, 63, 0), -ENOSYS);
}

static void a_frame_comes_and_goes(void)
{
    u64 pfn = virt_to_pfn(page), mfn = virt_to_mfn(page), before = domain_query(XENMEM_current_reservation);
    u64 *p2m = (u64 *)start_info->mfn_list;
    for (u32 i = 0; i < 20; i++) {
        CHECK_EQ(remap(page, 0), 0);
        CHECK_EQ(reservation(XENMEM_decrease_reservation, &mfn, 1, 0), 1);
        CHECK_EQ(domain_query(XENMEM_current_reservation), before - 1);
        CHECK_EQ(remap(page, mfn * PAGE_SIZE | PTE_KERNEL_RW), -EBUSY);
        u64 extent = pfn;
        CHECK_EQ(reservation(XENMEM_populate_physmap, &extent, 1, 0), 1);
        mfn = extent;
        CHECK_EQ(M2P[mfn], pfn);
        CHECK_EQ(remap(page, mfn * PAGE_SIZE | PTE_KERNEL_RW), 0);
        p2m[pfn] = mfn;
        for (u32 j = 0; j < PAGE_SIZE; j++)
            if (page[j]) {
                test_fail("a new frame is not zero at %u", j);
                return;
            }
        memset(page, 0xaa, PAGE_SIZE);
    }
    CHECK_EQ(domain_query(XENMEM_current_reservation), before);
}

static void the_reservation_has_a_maximum(void)
{
    static u64 taken[2048];
    u64 room = domain_query(XENMEM_maximum_reservation) - domain_query(XENMEM_current_reservation), count = 0;
    CHECK(room < ARRAY_SIZE(taken), "room for %lu more frames", room);
    while (count < ARRAY_SIZE(taken) && reservation(XENMEM_increase_reservation, &taken[count], 1, 0) == 1)
        count++;
    CHECK_EQ(count, room);
    CHECK_EQ(reservation(XENMEM_decrease_reservation, taken, count, 0), count);
    CHECK_EQ(domain_query(XENMEM_maximum_reservation) - domain_query(XENMEM_current_reservation), room);
}

static void bad_extents(void)
{
    u64 foreign[] = { 1, ~0ul, 1ul << 40 }, before = domain_query(XENMEM_current_reservation);
    for (u32 i = 0; i < ARRAY_SIZE(foreign); i++)
        CHECK_EQ(reservation(XENMEM_decrease_reservation, &foreign[i], 1, 0), 0);
    CHECK(reservation(XENMEM_populate_physmap, (u64 *)0x1000, 1, 0) <= 0, "extents at a bad address");
    u64 mfn = virt_to_mfn(page);
    CHECK(reservation(XENMEM_decrease_reservation, &mfn, 1, 60) <= 0, "an extent of order 60");
    CHECK(reservation(XENMEM_increase_reservation, 0, 1, 40) <= 0, "an extent of order 40");
    struct memory_reservation other = { (u64)&mfn, 1, 0, 0, 0 };
    CHECK(HC2(memory_op, XENMEM_decrease_reservation, &other) <= 0, "took a frame from dom0");
    other.domid = 4711;
    CHECK(HC2(memory_op, XENMEM_increase_reservation, &other) <= 0, "grew a domain that is not there");
    CHECK_EQ(domain_query(XENMEM_current_reservation), before);
}

/* A frame that is still mapped lives on until its mapping goes. */
static void a_mapped_frame_survives_its_release(void)
{
    u64 mfn = virt_to_mfn(page), pfn = virt_to_pfn(page);
    memset(page, 0x77, PAGE_SIZE);
    CHECK_EQ(reservation(XENMEM_decrease_reservation, &mfn, 1, 0), 1);
    CHECK_EQ(page[17], 0x77);
    CHECK_EQ(remap(page, 0), 0);
    CHECK_EQ(remap(page, mfn * PAGE_SIZE | PTE_KERNEL_RW), -EBUSY);
    u64 extent = pfn;
    CHECK_EQ(reservation(XENMEM_populate_physmap, &extent, 1, 0), 1);
    CHECK_EQ(remap(page, extent * PAGE_SIZE | PTE_KERNEL_RW), 0);
    ((u64 *)start_info->mfn_list)[pfn] = extent;
    CHECK_EQ(page[17], 0);
}

TESTS({ "queries", queries }, { "a_frame_comes_and_goes", a_frame_comes_and_goes },
      { "the_reservation_has_a_maximum", the_reservation_has_a_maximum }, { "bad_extents", bad_extents },
      { "a_mapped_frame_survives_its_release", a_mapped_frame_survives_its_release });
