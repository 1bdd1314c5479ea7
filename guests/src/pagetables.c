/* SPDX-License-Identifier: GPL-2.0-only */
/* Page tables belong to Xen: every entry is validated, no page table is ever writable, writes to L1s are emulated. */
#include "guest.h"

static u8 page[PAGE_SIZE] PAGE_ALIGNED = { 1 }, other[PAGE_SIZE] PAGE_ALIGNED = { 1 };
static u64 table[512] PAGE_ALIGNED = { 1 }, upper[512] PAGE_ALIGNED = { 1 };

#define FRAME(va) (virt_to_mfn(va) * PAGE_SIZE)

static s64 update(u64 maddr, u64 value)
{
    struct mmu_update u = { maddr, value };
    return HC4(mmu_update, &u, 1, 0, DOMID_SELF);
}

static s64 mmuext(u32 cmd, u64 arg1, u64 arg2)
{
    struct mmuext_op op = { cmd, 0, arg1, arg2 };
    return HC4(mmuext_op, &op, 1, 0, DOMID_SELF);
}

static NOINLINE void write_at(u64 address) { *(volatile u64 *)address = 0x5a; }

static void mmu_update_changes_an_entry(void)
{
    CHECK_EQ(update(pte_maddr(page), FRAME(page) | PTE_KERNEL_RO), 0);
    CHECK_EQ(mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0), 0);
    CHECK_EQ(catch_trap(write_at, (u64)page), 14);
    CHECK_EQ(update(pte_maddr(page), FRAME(other) | PTE_KERNEL_RW), 0);
    CHECK_EQ(mmuext(MMUEXT_TLB_FLUSH_LOCAL, 0, 0), 0);
    *(volatile u64 *)other = 0;
    CHECK_EQ(catch_trap(write_at, (u64)page), -1);
    CHECK_EQ(*(volatile u64 *)other, 0x5a);
    CHECK_EQ(update(pte_maddr(page), FRAME(page) | PTE_KERNEL_RW), 0);
    CHECK_EQ(mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0), 0);
}

static void a_batch_says_how_far_it_came(void)
{
    struct mmu_update batch[] = {
        { pte_maddr(page), FRAME(page) | PTE_KERNEL_RW },
        { pte_maddr(other), FRAME(other) | PTE_KERNEL_RW },
        { pte_maddr(page), FRAME((void *)start_info->pt_base) | PTE_KERNEL_RW },
        { pte_maddr(page), 0 },
    };
    u32 done = 99;
    CHECK_EQ(HC4(mmu_update, batch, 4, &done, DOMID_SELF), -EBUSY);
    CHECK_EQ(done, 2);
    CHECK_EQ(HC4(mmu_update, batch, 2, &done, DOMID_SELF), 0);
    CHECK_EQ(done, 2);
    CHECK_EQ(HC4(mmu_update, 0x1000, 1, &done, DOMID_SELF), -EFAULT);
}

static void a_page_table_cannot_be_mapped_writable(void)
{
    const void *l4 = (const void *)start_info->pt_base;
    CHECK_EQ(remap(page, FRAME(l4) | PTE_KERNEL_RW), -EBUSY);
    const void *l1 = (const void *)((u64)pte_of(page) & ~(PAGE_SIZE - 1ul));
    CHECK_EQ(remap(page, FRAME(l1) | PTE_KERNEL_RW), -EBUSY);
    CHECK_EQ(update(pte_maddr(page), FRAME(l1) | PTE_KERNEL_RW), -EBUSY);
    CHECK_EQ(remap(page, FRAME(l4) | PTE_KERNEL_RO), 0);
    CHECK(!memcmp(page, l4, PAGE_SIZE), "the read-only view differs");
    CHECK_EQ(catch_trap(write_at, (u64)page), 14);
    CHECK_EQ(remap(page, FRAME(page) | PTE_KERNEL_RW), 0);
    CHECK_EQ(catch_trap(write_at, (u64)page), -1);
}

static void other_peoples_frames_are_refused(void)
{
    CHECK_EQ(remap(page, 0 * PAGE_SIZE | PTE_KERNEL_RW), -EBUSY);
    CHECK_EQ(remap(page, 1 * PAGE_SIZE | PTE_KERNEL_RO), -EBUSY);
    CHECK_EQ(remap(page, 0xffffffffful << 12 | PTE_KERNEL_RO), -EPERM);     /* no RAM: I/O memory is not for us */
    CHECK_EQ(update(0x3ull << 44, 0), -EINVAL);
    CHECK_EQ(update(8, 0), -EINVAL);
    CHECK_EQ(update(pte_maddr(page) | 3, 0), -ENOSYS);
}

/* A page that is no table is simply written; nothing is validated because nothing follows from it. */
static void mmu_update_of_ordinary_memory(void)
{
    ((volatile u64 *)page)[5] = 0;
    CHECK_EQ(update(FRAME(page) + 40, 0x1234), 0);
    CHECK_EQ(((volatile u64 *)page)[5], 0x1234);
}

static void bad_flags_are_refused(void)
{
    u64 rw = FRAME(page) | PTE_KERNEL_RW;
    CHECK_EQ(remap(page, rw | 0x80), -EINVAL);                      /* PAT of an L1: not for a guest */
    u64 *l4 = (u64 *)start_info->pt_base, *l3 = mfn_to_virt(MADDR(l4[511]) / PAGE_SIZE);
    u64 *l2 = mfn_to_virt(MADDR(l3[510]) / PAGE_SIZE);
    u64 entry = FRAME(l2) + 100 * 8;
    CHECK_EQ(update(entry, FRAME(page) | PTE_TABLE | PTE_PSE), -EINVAL);
    CHECK_EQ(update(entry, FRAME(page) | PTE_TABLE), -EINVAL);      /* page is writable: no page table */
    CHECK_EQ(update(FRAME(l4) + 256 * 8, 0), -EINVAL);              /* Xen's slots */
    CHECK_EQ(update(FRAME(l4) + 271 * 8, FRAME(l3) | PTE_TABLE), -EINVAL);
    CHECK_EQ(remap(page, rw), 0);
}

static void pinning(void)
{
    memset(table, 0, PAGE_SIZE);
    table[7] = FRAME(page) | PTE_KERNEL_RW;
    u64 mfn = virt_to_mfn(table);
    CHECK_EQ(mmuext(MMUEXT_PIN_L1, mfn, 0), -EINVAL);               /* mapped writable */
    CHECK_EQ(mmuext(MMUEXT_UNPIN, mfn, 0), -EINVAL);
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RO), 0);
    CHECK_EQ(mmuext(MMUEXT_PIN_L1, mfn, 0), 0);
    CHECK_EQ(mmuext(MMUEXT_PIN_L1, mfn, 0), -EINVAL);
    CHECK_EQ(mmuext(MMUEXT_PIN_L2, mfn, 0), -EINVAL);
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RW), -EBUSY);
    CHECK_EQ(mmuext(MMUEXT_UNPIN, mfn, 0), 0);
    CHECK_EQ(mmuext(MMUEXT_UNPIN, mfn, 0), -EINVAL);
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RW), 0);
    table[7] = FRAME((void *)start_info->pt_base) | PTE_KERNEL_RW;  /* would map the L4 writable */
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RO), 0);
    CHECK_EQ(mmuext(MMUEXT_PIN_L1, mfn, 0), -EBUSY);
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RW), 0);
    table[7] = 0;
}

/* A new L1 in a free slot of the kernel's L2, used, and taken away. */
static void a_new_table(void)
{
    u64 *l4 = (u64 *)start_info->pt_base, *l3 = mfn_to_virt(MADDR(l4[511]) / PAGE_SIZE);
    u64 *l2 = mfn_to_virt(MADDR(l3[510]) / PAGE_SIZE);
    u32 slot = 511;
    CHECK_EQ(l2[slot], 0);
    memset(table, 0, PAGE_SIZE);
    table[3] = FRAME(page) | PTE_KERNEL_RW;
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RO), 0);
    CHECK_EQ(update(FRAME(l2) + slot * 8, FRAME(table) | PTE_TABLE), 0);
    volatile u64 *through = (volatile u64 *)(VIRT_BASE + slot * 0x200000ul + 3 * PAGE_SIZE);
    *through = 0x1234567;
    CHECK_EQ(*(volatile u64 *)page, 0x1234567);
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RW), -EBUSY);
    CHECK_EQ(update(FRAME(l2) + slot * 8, 0), 0);
    CHECK_EQ(mmuext(MMUEXT_TLB_FLUSH_LOCAL, 0, 0), 0);
    CHECK_EQ(catch_trap(write_at, (u64)through), 14);
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RW), 0);
}

static void a_table_cannot_be_two_levels(void)
{
    memset(upper, 0, PAGE_SIZE);
    memset(table, 0, PAGE_SIZE);
    upper[0] = FRAME(table) | PTE_TABLE;
    CHECK_EQ(remap(upper, FRAME(upper) | PTE_KERNEL_RO), 0);
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RO), 0);
    CHECK_EQ(mmuext(MMUEXT_PIN_L2, virt_to_mfn(upper), 0), 0);
    CHECK_EQ(mmuext(MMUEXT_PIN_L2, virt_to_mfn(table), 0), -EINVAL);
    CHECK_EQ(update(FRAME(upper) + 8, FRAME(upper) | PTE_TABLE), -EINVAL);
    CHECK_EQ(mmuext(MMUEXT_UNPIN, virt_to_mfn(upper), 0), 0);
    CHECK_EQ(remap(table, FRAME(table) | PTE_KERNEL_RW), 0);
    CHECK_EQ(remap(upper, FRAME(upper) | PTE_KERNEL_RW), 0);
}

static NOINLINE void store(u64 value) { *pte_of(page) = value; }

static void writes_to_an_l1_are_emulated(void)
{
    CHECK_EQ(HC2(vm_assist, 0, 2), 0);
    for (u32 i = 0; i < 50; i++) {
        CHECK_EQ(catch_trap(store, FRAME(other) | PTE_KERNEL_RW), -1);
        mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0);
        *(volatile u64 *)page = i;
        CHECK_EQ(*(volatile u64 *)other, i);
        CHECK_EQ(catch_trap(store, FRAME(page) | PTE_KERNEL_RW), -1);
        mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0);
    }
    u64 swapped = __atomic_exchange_n(pte_of(page), FRAME(page) | PTE_KERNEL_RO, __ATOMIC_SEQ_CST);
    CHECK_EQ(MADDR(swapped), FRAME(page));
    mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0);
    CHECK_EQ(catch_trap(write_at, (u64)page), 14);
    __atomic_fetch_or(pte_of(page), PTE_RW, __ATOMIC_SEQ_CST);
    mmuext(MMUEXT_INVLPG_LOCAL, (u64)page, 0);
    CHECK_EQ(catch_trap(write_at, (u64)page), -1);
}

static void an_emulated_write_is_validated(void)
{
    u64 before = *pte_of(page);
    s64 vector = catch_trap(store, FRAME((void *)start_info->pt_base) | PTE_KERNEL_RW);
    CHECK(vector == 14 || vector == 13, "a writable mapping of an L4 gave vector %ld", vector);
    CHECK_EQ(*pte_of(page), before);
    vector = catch_trap(store, 1 * PAGE_SIZE | PTE_KERNEL_RW);
    CHECK(vector == 14 || vector == 13, "a mapping of Xen's frame gave vector %ld", vector);
    CHECK_EQ(*pte_of(page), before);
    volatile u64 *l4 = (volatile u64 *)start_info->pt_base;
    CHECK_EQ(catch_trap(write_at, (u64)&l4[300]), 14);      /* only L1s are emulated */
}

static void base_pointer(void)
{
    u64 l4 = virt_to_mfn((void *)start_info->pt_base);
    CHECK_EQ(mmuext(MMUEXT_NEW_BASEPTR, l4, 0), 0);
    CHECK(mmuext(MMUEXT_NEW_BASEPTR, virt_to_mfn(page), 0) < 0, "a writable page became CR3");
    CHECK(mmuext(MMUEXT_NEW_BASEPTR, 1, 0) < 0, "Xen's frame became CR3");
    CHECK(mmuext(MMUEXT_NEW_BASEPTR, ~0ul, 0) < 0, "no frame at all became CR3");
    CHECK_EQ(mmuext(99, 0, 0), -ENOSYS);
}

static void clear_and_copy(void)
{
    memset(page, 0x11, PAGE_SIZE);
    CHECK_EQ(mmuext(MMUEXT_COPY_PAGE, virt_to_mfn(other), virt_to_mfn(page)), 0);
    CHECK(!memcmp(page, other, PAGE_SIZE), "not copied");
    CHECK_EQ(mmuext(MMUEXT_CLEAR_PAGE, virt_to_mfn(page), 0), 0);
    CHECK_EQ(page[0] | page[PAGE_SIZE - 1], 0);
    CHECK_EQ(mmuext(MMUEXT_CLEAR_PAGE, virt_to_mfn((void *)start_info->pt_base), 0), -EINVAL);
    CHECK_EQ(mmuext(MMUEXT_COPY_PAGE, virt_to_mfn((void *)start_info->pt_base), virt_to_mfn(page)), -EINVAL);
    CHECK_EQ(mmuext(MMUEXT_CLEAR_PAGE, 1, 0), -EINVAL);
}

static void machine_to_phys_update(void)
{
    u64 mfn = virt_to_mfn(page), pfn = virt_to_pfn(page);
    CHECK_EQ(update(mfn * PAGE_SIZE | 1, pfn + 1), 0);
    CHECK_EQ(M2P[mfn], pfn + 1);
    CHECK_EQ(update(mfn * PAGE_SIZE | 1, pfn), 0);
    CHECK_EQ(M2P[mfn], pfn);
    CHECK_EQ(update(1 * PAGE_SIZE | 1, 0), -EINVAL);
    CHECK_EQ(update(0x3ull << 44 | 1, 0), -EINVAL);
}

static void accessed_and_dirty_can_be_preserved(void)
{
    u64 maddr = pte_maddr(page);
    *(volatile u8 *)page = 1;
    CHECK_EQ(update(maddr | 2, FRAME(page) | PTE_P | PTE_RW), 0);
    CHECK_EQ(*pte_of(page) & (PTE_A | PTE_D), PTE_A | PTE_D);
    CHECK_EQ(update(maddr, FRAME(page) | PTE_KERNEL_RW), 0);
}

TESTS({ "mmu_update_changes_an_entry", mmu_update_changes_an_entry },
      { "a_batch_says_how_far_it_came", a_batch_says_how_far_it_came },
      { "a_page_table_cannot_be_mapped_writable", a_page_table_cannot_be_mapped_writable },
      { "other_peoples_frames_are_refused", other_peoples_frames_are_refused },
      { "mmu_update_of_ordinary_memory", mmu_update_of_ordinary_memory },
      { "bad_flags_are_refused", bad_flags_are_refused }, { "pinning", pinning }, { "a_new_table", a_new_table },
      { "a_table_cannot_be_two_levels", a_table_cannot_be_two_levels },
      { "writes_to_an_l1_are_emulated", writes_to_an_l1_are_emulated },
      { "an_emulated_write_is_validated", an_emulated_write_is_validated }, { "base_pointer", base_pointer },
      { "clear_and_copy", clear_and_copy }, { "machine_to_phys_update", machine_to_phys_update },
      { "accessed_and_dirty_can_be_preserved", accessed_and_dirty_can_be_preserved });
