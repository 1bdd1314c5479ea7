/* SPDX-License-Identifier: GPL-2.0-only */
#include "guest.h"

u64 virt_to_pfn(const void *va)
{
    return ((u64)va - VIRT_BASE) / PAGE_SIZE;
}

u64 virt_to_mfn(const void *va)
{
    return ((const u64 *)start_info->mfn_list)[virt_to_pfn(va)];
}

void *mfn_to_virt(u64 mfn)
{
    return (void *)(VIRT_BASE + M2P[mfn] * PAGE_SIZE);
}

static volatile u64 *entry_of(const void *va)
{
    u64 *table = (u64 *)start_info->pt_base;
    for (int shift = 39; shift > 12; shift -= 9)
        table = mfn_to_virt(MADDR(table[(u64)va >> shift & 511]) / PAGE_SIZE);
    return &table[(u64)va >> 12 & 511];
}

volatile u64 *pte_of(const void *va)
{
    return entry_of(va);
}

u64 pte_maddr(const void *va)
{
    volatile u64 *entry = entry_of(va);
    return virt_to_mfn((const void *)entry) * PAGE_SIZE + ((u64)entry & (PAGE_SIZE - 1));
}

s64 remap(const void *va, u64 pte)
{
    return HC3(update_va_mapping, va, pte, UVMF_INVLPG);
}
