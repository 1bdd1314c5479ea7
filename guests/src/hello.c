/* SPDX-License-Identifier: GPL-2.0-only */
/* The smallest guest: start of day is what the ABI says, text reaches the console, both hypercall paths work. */
#include "guest.h"

static void start_of_day(void)
{
    CHECK(!memcmp(start_info->magic, "xen-3.0-x86_64", 14), "magic is %s", start_info->magic);
    CHECK(start_info->nr_pages > 0 && start_info->nr_pt_frames > 0, "no pages");
    CHECK_EQ(start_info->flags & 3, 0);
    CHECK_EQ(shared->vcpu[0].upcall_mask, 1);
    CHECK_EQ(shared->vcpu[1].upcall_mask, 1);
}

static void machine_to_phys(void)
{
    const u64 *p2m = (const u64 *)start_info->mfn_list;
    for (u64 pfn = 0; pfn < start_info->nr_pages; pfn++)
        if (M2P[p2m[pfn]] != pfn) {
            test_fail("pfn %lx is mfn %lx, which is pfn %lx", pfn, p2m[pfn], M2P[p2m[pfn]]);
            return;
        }
}

static void both_hypercall_paths(void)
{
    s64 by_page = HC2(xen_version, XENVER_version, 0);
    CHECK_EQ(by_page, 4 << 16 | 6);
    CHECK_EQ(syscall5(HC_xen_version, XENVER_version, 0, 0, 0, 0), by_page);
}

static void unknown_hypercalls(void)
{
    CHECK_EQ(syscall5(63, 0, 0, 0, 0, 0), -ENOSYS);
    CHECK_EQ(syscall5(64, 0, 0, 0, 0, 0), -ENOSYS);
    CHECK_EQ(syscall5(0xffffffff, 0, 0, 0, 0, 0), -ENOSYS);
    CHECK_EQ(syscall5(11, 0, 0, 0, 0, 0), -ENOSYS);
}

static void emergency_console(void)
{
    static const char line[] = "hello from the test guest\n";
    s64 rc = HC3(console_io, 0, sizeof(line) - 1, line);
    CHECK(rc == 0 || rc == (s64)sizeof(line) - 1, "console_io: %ld", rc);
    CHECK_EQ(HC3(console_io, 1, 16, line), -EPERM);
}

TESTS({ "start_of_day", start_of_day }, { "machine_to_phys", machine_to_phys },
      { "both_hypercall_paths", both_hypercall_paths }, { "unknown_hypercalls", unknown_hypercalls },
      { "emergency_console", emergency_console });
