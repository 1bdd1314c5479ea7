/* SPDX-License-Identifier: GPL-2.0-only */
/* xen_version, multicall, vm_assist, vcpu_op, and operations that a guest may not do. */
#include "guest.h"

static void xen_version(void)
{
    char text[1024];
    CHECK_EQ(HC2(xen_version, XENVER_version, 0), 4 << 16 | 6);
    CHECK_EQ(HC2(xen_version, XENVER_extraversion, text), 0);
    CHECK_EQ(HC2(xen_version, XENVER_capabilities, text), 0);
    CHECK(!memcmp(text, "xen-3.0-x86_64", 14), "capabilities: %s", text);
    u64 start = 0;
    CHECK_EQ(HC2(xen_version, XENVER_platform_parameters, &start), 0);
    CHECK_EQ(start, 0xffff800000000000);
    CHECK_EQ(HC2(xen_version, XENVER_pagesize, 0), PAGE_SIZE);
    CHECK_EQ(HC2(xen_version, XENVER_extraversion, 0x1000), -EFAULT);
    CHECK_EQ(HC2(xen_version, 77, 0), -ENOSYS);
}

static void features(void)
{
    struct { u32 index, map; } f = { 0, 0 };
    CHECK_EQ(HC2(xen_version, XENVER_get_features, &f), 0);
    CHECK(f.map & 1 << 5, "no mmu_pt_update_preserve_ad: %x", f.map);
    CHECK(!(f.map & 1 << 2), "auto-translated: %x", f.map);
    f.index = 5;
    CHECK_EQ(HC2(xen_version, XENVER_get_features, &f), -EINVAL);
}

static void multicall(void)
{
    struct multicall calls[] = {
        { HC_xen_version, 99, { XENVER_version } },
        { 63, 99, { 0 } },
        { HC_xen_version, 99, { XENVER_pagesize } },
        { HC_vm_assist, 99, { 7, 7 } },
    };
    CHECK_EQ(HC2(multicall, calls, 4), 0);
    CHECK_EQ(calls[0].result, 4 << 16 | 6);
    CHECK_EQ(calls[1].result, -ENOSYS);
    CHECK_EQ(calls[2].result, PAGE_SIZE);
    CHECK_EQ(calls[3].result, -EINVAL);
    CHECK_EQ(HC2(multicall, calls, 0), 0);
    CHECK_EQ(HC2(multicall, 0x1000, 1), -EFAULT);
}

static void multicalls_do_not_nest(void)
{
    struct multicall inner[] = { { HC_xen_version, 99, { XENVER_version } } };
    struct multicall calls[] = { { HC_multicall, 99, { (u64)inner, 1 } } };
    s64 rc = HC2(multicall, calls, 1);
    CHECK(rc == -EINVAL || (rc == 0 && calls[0].result == -EINVAL), "rc %ld, result %ld", rc, calls[0].result);
    CHECK_EQ(inner[0].result, 99);
}

static void a_long_multicall_is_preempted_and_ends(void)
{
    static struct multicall calls[4000];
    for (u32 i = 0; i < ARRAY_SIZE(calls); i++)
        calls[i] = (struct multicall){ HC_xen_version, 99, { i % 2 ? XENVER_pagesize : XENVER_version } };
    CHECK_EQ(HC2(multicall, calls, ARRAY_SIZE(calls)), 0);
    for (u32 i = 0; i < ARRAY_SIZE(calls); i++)
        CHECK_EQ(calls[i].result, i % 2 ? PAGE_SIZE : 4 << 16 | 6);
}

static void vm_assist(void)
{
    CHECK_EQ(HC2(vm_assist, 0, 2), 0);
    CHECK_EQ(HC2(vm_assist, 1, 2), 0);
    CHECK_EQ(HC2(vm_assist, 0, 63), -EINVAL);
    CHECK_EQ(HC2(vm_assist, 0, 1000), -EINVAL);
    CHECK_EQ(HC2(vm_assist, 9, 2), -ENOSYS);
}

static void vcpu_op(void)
{
    CHECK_EQ(HC3(vcpu_op, VCPUOP_is_up, 0, 0), 1);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_is_up, 1000, 0), -ENOENT);
    CHECK_EQ(HC3(vcpu_op, 99, 0, 0), -ENOSYS);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_initialise, 0, 0x1000), -EFAULT);
}

static u8 info_page[PAGE_SIZE] PAGE_ALIGNED = { 1 };

static void register_vcpu_info(void)
{
    struct { u64 mfn; u32 offset, pad; } where = { virt_to_mfn(info_page), PAGE_SIZE - 32, 0 };
    CHECK_EQ(HC3(vcpu_op, VCPUOP_register_vcpu_info, 0, &where), -EINVAL);
    where.offset = 0;
    where.mfn = 1;
    CHECK_EQ(HC3(vcpu_op, VCPUOP_register_vcpu_info, 0, &where), -EINVAL);
    where.mfn = virt_to_mfn((void *)start_info->pt_base);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_register_vcpu_info, 0, &where), -EINVAL);
}

static void what_a_guest_may_not_do(void)
{
    u32 domctl[64] = { 1, 0xb }, sysctl[64] = { 1, 0xc };
    CHECK(HC1(domctl, domctl) < 0, "domctl");
    CHECK(HC1(sysctl, sysctl) < 0, "sysctl");
    struct { u16 domid; u32 reason; } remote = { 0, SHUTDOWN_crash };
    CHECK_EQ(HC2(sched_op, SCHEDOP_remote_shutdown, &remote), -EPERM);
    CHECK_EQ(HC2(sched_op, 77, 0), -ENOSYS);
}

static void yield(void)
{
    for (u32 i = 0; i < 100; i++)
        CHECK_EQ(HC2(sched_op, SCHEDOP_yield, 0), 0);
}

static void cpuid(void)
{
    u32 a = 0x40000000, b, c = 0, d;
    /* Xen's prefix: ud2 "xen" cpuid */
    __asm__ volatile(".byte 0x0f,0x0b,0x78,0x65,0x6e\n cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    CHECK(b == 0x566e6558 && c == 0x65584d4d && d == 0x4d4d566e, "signature %x %x %x", b, c, d);
    a = 0x40000001;
    c = 0;
    __asm__ volatile(".byte 0x0f,0x0b,0x78,0x65,0x6e\n cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    CHECK_EQ(a, 4 << 16 | 6);
    a = 1;
    c = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    CHECK(!(d & 1 << 3) && !(d & 1 << 13), "PSE or PGE for a PV guest: %x", d);
}

TESTS({ "xen_version", xen_version }, { "features", features }, { "multicall", multicall },
      { "multicalls_do_not_nest", multicalls_do_not_nest },
      { "a_long_multicall_is_preempted_and_ends", a_long_multicall_is_preempted_and_ends }, { "vm_assist", vm_assist },
      { "vcpu_op", vcpu_op }, { "register_vcpu_info", register_vcpu_info },
      { "what_a_guest_may_not_do", what_a_guest_may_not_do }, { "yield", yield }, { "cpuid", cpuid });
