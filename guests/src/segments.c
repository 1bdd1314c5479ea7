/* SPDX-License-Identifier: GPL-2.0-only */
/* Segment bases and descriptor tables: what a guest may load, and what Xen refuses to store. */
#include "guest.h"

static u64 words[2] = { 0x1111, 0x2222 };
static u64 gdt[512] PAGE_ALIGNED = { 1 }, ldt[512] PAGE_ALIGNED = { 1 };

#define DATA_DPL3 0x00cff3000000fffful
#define CODE_DPL3 0x00affb000000fffful
#define AVAILABLE_TSS 0x0000890000000067ul

static u64 fs_word(void) { u64 v; __asm__ volatile("mov %%fs:0, %0" : "=r"(v)); return v; }
static u64 gs_word(void) { u64 v; __asm__ volatile("mov %%gs:0, %0" : "=r"(v)); return v; }
static void load_ds(u64 s) { __asm__ volatile("mov %w0, %%ds" : : "r"(s)); }
static void load_fs(u64 s) { __asm__ volatile("mov %w0, %%fs" : : "r"(s)); }
static void wrmsr(u32 msr, u64 value)
{
    __asm__ volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)));
}
static u64 rdmsr(u32 msr)
{
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (u64)high << 32 | low;
}

static s64 protect(const void *va, u64 flags) { return remap(va, virt_to_mfn(va) * PAGE_SIZE | flags); }

static void bases_by_hypercall(void)
{
    CHECK_EQ(HC2(set_segment_base, SEGBASE_FS, &words[0]), 0);
    CHECK_EQ(fs_word(), 0x1111);
    CHECK_EQ(HC2(set_segment_base, SEGBASE_GS_KERNEL, &words[1]), 0);
    CHECK_EQ(gs_word(), 0x2222);
    CHECK_EQ(HC2(set_segment_base, SEGBASE_GS_USER, &words[0]), 0);
    CHECK_EQ(gs_word(), 0x2222);
}

static void bases_by_msr(void)
{
    wrmsr(0xc0000100, (u64)&words[1]);
    CHECK_EQ(fs_word(), 0x2222);
    CHECK_EQ(rdmsr(0xc0000100), (u64)&words[1]);
    wrmsr(0xc0000101, (u64)&words[0]);
    CHECK_EQ(gs_word(), 0x1111);
    CHECK_EQ(rdmsr(0xc0000101), (u64)&words[0]);
}

static void bad_bases(void)
{
    CHECK_EQ(HC2(set_segment_base, SEGBASE_FS, 0x8000000000000000), -EINVAL);
    CHECK_EQ(HC2(set_segment_base, SEGBASE_GS_USER, 0x8000000000000000), -EINVAL);
    CHECK_EQ(HC2(set_segment_base, SEGBASE_GS_KERNEL, 0x8000000000000000), -EINVAL);
    CHECK_EQ(HC2(set_segment_base, 7, 0), -EINVAL);
}

static void global_descriptor_table(void)
{
    u64 frame = virt_to_mfn(gdt);
    memset(gdt, 0, PAGE_SIZE);
    gdt[2] = DATA_DPL3;
    CHECK_EQ(HC2(set_gdt, &frame, 512), -EINVAL);       /* still mapped writable */
    CHECK_EQ(protect(gdt, PTE_KERNEL_RO), 0);
    CHECK_EQ(HC2(set_gdt, &frame, 14 * 512 + 1), -EINVAL);
    CHECK_EQ(HC2(set_gdt, &frame, 512), 0);
    CHECK_EQ(protect(gdt, PTE_KERNEL_RW), -EBUSY);     /* a descriptor page is never writable */
    CHECK_EQ(catch_trap(load_ds, 2 * 8 | 3), -1);
    CHECK_EQ(catch_trap(load_ds, 3 * 8 | 3), 13);
    CHECK_EQ(caught.error, 3 * 8);
    load_ds(0);
}

static s64 update(const u64 *entry, u64 descriptor)
{
    return HC2(update_descriptor, virt_to_mfn(entry) * PAGE_SIZE + ((u64)entry & 0xfff), descriptor);
}

static void update_descriptor(void)
{
    CHECK_EQ(update(&gdt[3], DATA_DPL3), 0);
    CHECK_EQ(catch_trap(load_ds, 3 * 8 | 3), -1);
    CHECK_EQ(update(&gdt[4], CODE_DPL3), 0);
    CHECK_EQ(update(&gdt[4], 0), 0);
    CHECK_EQ(gdt[4], 0);
    CHECK_EQ(HC2(update_descriptor, virt_to_mfn(gdt) * PAGE_SIZE + 4, 0), -EINVAL);     /* not aligned */
    CHECK_EQ(HC2(update_descriptor, 0xfffffffffffff000, 0), -EINVAL);
    load_ds(0);
}

static void bad_descriptors_are_refused(void)
{
    static const u64 bad[] = {
        AVAILABLE_TSS,                          /* TSS */
        0x00008b0000000067ul,                   /* busy TSS */
        0x0000820000000067ul,                   /* LDT */
        0x00008e00e0080000ul,                   /* interrupt gate */
        0x00008f00e0080000ul,                   /* trap gate */
        0x0000ec00e0080000ul,                   /* call gate to Xen's code segment */
    };
    for (u32 i = 0; i < ARRAY_SIZE(bad); i++)
        CHECK_EQ(update(&gdt[5], bad[i]), -EINVAL);
    CHECK_EQ(gdt[5], 0);
    CHECK_EQ(update(&gdt[5], DATA_DPL3 & ~(3ul << 45)), 0);     /* DPL 0: stored with the guest's */
    CHECK(gdt[5] >> 45 & 3, "a descriptor of DPL 0 was stored: %lx", gdt[5]);
    CHECK_EQ(update(&gdt[5], 0), 0);
}

/* The first use of an LDT selector maps the LDT's page. */
static void local_descriptor_table(void)
{
    memset(ldt, 0, PAGE_SIZE);
    ldt[1] = DATA_DPL3;
    CHECK_EQ(protect(ldt, PTE_KERNEL_RO), 0);
    struct mmuext_op op = { MMUEXT_SET_LDT, 0, (u64)ldt, 512 };
    CHECK_EQ(HC4(mmuext_op, &op, 1, 0, DOMID_SELF), 0);
    CHECK_EQ(catch_trap(load_fs, 1 * 8 | 7), -1);
    CHECK_EQ(catch_trap(load_fs, 2 * 8 | 7), 13);
    CHECK_EQ(caught.error, 2 * 8 | 4);
    load_fs(0);
    struct mmuext_op unaligned = { MMUEXT_SET_LDT, 0, (u64)ldt + 8, 8 };
    CHECK(HC4(mmuext_op, &unaligned, 1, 0, DOMID_SELF) < 0, "an LDT that is not page aligned was taken");
    struct mmuext_op huge = { MMUEXT_SET_LDT, 0, (u64)ldt, 8193 };
    CHECK(HC4(mmuext_op, &huge, 1, 0, DOMID_SELF) < 0, "an LDT of 8193 entries was taken");
    struct mmuext_op none = { MMUEXT_SET_LDT, 0, 0, 0 };
    CHECK_EQ(HC4(mmuext_op, &none, 1, 0, DOMID_SELF), 0);
    CHECK_EQ(protect(ldt, PTE_KERNEL_RW), 0);
}

TESTS({ "bases_by_hypercall", bases_by_hypercall }, { "bases_by_msr", bases_by_msr }, { "bad_bases", bad_bases },
      { "global_descriptor_table", global_descriptor_table }, { "update_descriptor", update_descriptor },
      { "bad_descriptors_are_refused", bad_descriptors_are_refused },
      { "local_descriptor_table", local_descriptor_table });
