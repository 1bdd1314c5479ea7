/* SPDX-License-Identifier: GPL-2.0-only */
/* User mode: its own L4, system calls, faults, and that it is not the kernel. */
#include "guest.h"

static u64 l4[512] PAGE_ALIGNED = { 1 }, l3[512] PAGE_ALIGNED = { 1 }, l2[512] PAGE_ALIGNED = { 1 };
static u64 l1[512] PAGE_ALIGNED = { 1 };
static u8 code[PAGE_SIZE] PAGE_ALIGNED = { 1 }, stack[PAGE_SIZE] PAGE_ALIGNED = { 1 };

#define CODE 0x400000ul
#define STACK 0x402000ul
#define STACK_TOP (STACK + 0xff0)
#define USER_PTE (PTE_P | PTE_US | PTE_A | PTE_D)

extern char user_syscall[], user_after[], user_fault[], user_cli[], user_int91[], user_spin[], user_sysret[], user_end[],
            user_write[], user_gs[], user_int91_after[];
__asm__(".section .rodata\n"
        ".globl user_syscall, user_after, user_fault, user_cli, user_int91, user_int91_after, user_spin, user_end\n"
        ".globl user_write, user_gs\n"
        "user_syscall: mov $0x1234, %eax\n push %rdi\n pop %rbx\n stc\n syscall\nuser_after: ud2\n"
        "user_fault: mov (%rdi), %rax\n mov $0x77, %eax\n syscall\n"
        "user_write: mov %rax, (%rdi)\n mov $0x78, %eax\n syscall\n"
        "user_cli: cli\n mov $0x79, %eax\n syscall\n"
        "user_int91: int $0x91\nuser_int91_after: ud2\n"
        "user_gs: mov %gs:0, %rax\n syscall\n"
        "user_end:\n.previous");
#define USER(label) (CODE + ((u64)(label) - (u64)user_syscall))

static int ready;

static s64 read_only(const void *va)
{
    return remap(va, virt_to_mfn(va) * PAGE_SIZE | PTE_KERNEL_RO);
}

static s64 set_entry(const void *table, u32 index, u64 value)
{
    struct mmu_update update = { virt_to_mfn(table) * PAGE_SIZE + index * 8, value };
    return HC4(mmu_update, &update, 1, 0, DOMID_SELF);
}

static s64 mmuext(u32 cmd, u64 arg1)
{
    struct mmuext_op op = { cmd, 0, arg1, 0 };
    return HC4(mmuext_op, &op, 1, 0, DOMID_SELF);
}

static void user_address_space(void)
{
    memset(l4, 0, PAGE_SIZE);
    memset(l3, 0, PAGE_SIZE);
    memset(l2, 0, PAGE_SIZE);
    memset(l1, 0, PAGE_SIZE);
    memset(code, 0xcc, PAGE_SIZE);
    memcpy(code, user_syscall, user_end - user_syscall);
    l1[CODE >> 12 & 511] = virt_to_mfn(code) * PAGE_SIZE | USER_PTE;
    l1[STACK >> 12 & 511] = virt_to_mfn(stack) * PAGE_SIZE | USER_PTE | PTE_RW;
    l2[CODE >> 21 & 511] = virt_to_mfn(l1) * PAGE_SIZE | PTE_TABLE;
    l3[0] = virt_to_mfn(l2) * PAGE_SIZE | PTE_TABLE;
    l4[0] = virt_to_mfn(l3) * PAGE_SIZE | PTE_TABLE;
    CHECK_EQ(mmuext(MMUEXT_PIN_L4, virt_to_mfn(l4)), -EINVAL);  /* its tables are still writable here */
    CHECK(!read_only(l4) && !read_only(l3) && !read_only(l2) && !read_only(l1), "cannot make tables read-only");
    CHECK_EQ(mmuext(MMUEXT_NEW_USER_BASEPTR, virt_to_mfn(code)), -EINVAL);
    CHECK_EQ(mmuext(MMUEXT_PIN_L4, virt_to_mfn(l4)), 0);
    CHECK_EQ(mmuext(MMUEXT_NEW_USER_BASEPTR, virt_to_mfn(l4)), 0);
    ready = 1;
}

#define NEED_USER CHECK(ready, "no user address space")

static void system_call(void)
{
    NEED_USER;
    for (u32 i = 0; i < 100; i++) {
        run_user(USER(user_syscall), STACK_TOP, 0xabcdef, 0);
        CHECK_EQ(user_exit.vector, -3);
        CHECK_EQ(user_exit.rax, 0x1234);
        CHECK_EQ(user_exit.rip, USER(user_after));
        CHECK_EQ(user_exit.rcx, USER(user_after));
        CHECK_EQ(user_exit.r11 & 0x201, 0x201);
        CHECK_EQ(user_exit.rflags & 0x201, 0x201);
        CHECK_EQ(user_exit.rsp, STACK_TOP);
        CHECK_EQ(user_exit.cs & 0xffff, USER_CS);
        CHECK_EQ(user_exit.ss & 0xffff, USER_SS);
    }
    CHECK_EQ(((u64 *)(stack + 0xff0))[-1], 0xabcdef);
}

/* VGCF_in_syscall: RCX and R11 of the frame are not used, SYSRET sets them. */
static void return_from_system_call(void)
{
    NEED_USER;
    run_user(USER(user_syscall), STACK_TOP, 1, 0x100);
    CHECK_EQ(user_exit.vector, -3);
    CHECK_EQ(user_exit.rip, USER(user_after));
}

static void user_faults(void)
{
    NEED_USER;
    run_user(USER(user_fault), STACK_TOP, 0x500000, 0);
    CHECK_EQ(user_exit.vector, 14);
    CHECK_EQ(user_exit.error, 4);
    CHECK_EQ(vcpu0->cr2, 0x500000);
    CHECK_EQ(user_exit.rip, USER(user_fault));
    run_user(USER(user_write), STACK_TOP, CODE, 0);
    CHECK_EQ(user_exit.vector, 14);
    CHECK_EQ(user_exit.error, 7);
    run_user(USER(user_write), STACK_TOP, STACK, 0);
    CHECK_EQ(user_exit.vector, -3);
    CHECK_EQ(user_exit.rax, 0x78);
}

static void the_kernel_is_not_mapped_for_user(void)
{
    NEED_USER;
    run_user(USER(user_fault), STACK_TOP, (u64)code, 0);
    CHECK_EQ(user_exit.vector, 14);
    CHECK_EQ(user_exit.error & 4, 4);
    run_user(USER(user_write), STACK_TOP, (u64)code, 0);
    CHECK_EQ(user_exit.vector, 14);
    run_user(USER(user_write), STACK_TOP, (u64)M2P, 0);
    CHECK_EQ(user_exit.vector, 14);
    run_user(USER(user_fault), STACK_TOP, 0xffff830000000000, 0);
    CHECK_EQ(user_exit.vector, 14);
}

static void privileged_instructions_fault(void)
{
    NEED_USER;
    run_user(USER(user_cli), STACK_TOP, 0, 0);
    CHECK_EQ(user_exit.vector, 13);
    CHECK_EQ(user_exit.error, 0);
    CHECK_EQ(user_exit.rip, USER(user_cli));
}

static void gates_by_dpl(void)
{
    NEED_USER;
    traps_init(1);
    run_user(USER(user_int91), STACK_TOP, 0, 0);
    CHECK_EQ(user_exit.vector, 13);
    CHECK_EQ(user_exit.error, 0x91 * 8 + 2);
    traps_init(3);
    run_user(USER(user_int91), STACK_TOP, 0, 0);
    CHECK_EQ(user_exit.vector, 0x91);
    CHECK_EQ(user_exit.rip, USER(user_int91_after));
    traps_init(0);
}

/* Clearing an entry and flushing takes the page away at once. */
static void tlb_follows_page_tables(void)
{
    NEED_USER;
    u64 index = STACK >> 12 & 511, old = l1[index];
    run_user(USER(user_write), STACK_TOP, STACK, 0);
    CHECK_EQ(user_exit.vector, -3);
    CHECK_EQ(set_entry(l1, index, old & ~PTE_RW), 0);
    CHECK_EQ(mmuext(MMUEXT_TLB_FLUSH_LOCAL, 0), 0);
    run_user(USER(user_write), STACK_TOP, STACK, 0);
    CHECK_EQ(user_exit.vector, 14);
    CHECK_EQ(user_exit.error, 7);
    CHECK_EQ(set_entry(l1, index, old), 0);
    run_user(USER(user_write), STACK_TOP, STACK, 0);
    CHECK_EQ(user_exit.vector, -3);
}

static u64 kernel_word = 0x4b45524e;

static void gs_bases_are_swapped(void)
{
    NEED_USER;
    *(u64 *)stack = 0x55534552;
    CHECK_EQ(HC2(set_segment_base, SEGBASE_GS_USER, STACK), 0);
    CHECK_EQ(HC2(set_segment_base, SEGBASE_GS_KERNEL, &kernel_word), 0);
    run_user(USER(user_gs), STACK_TOP, 0, 0);
    CHECK_EQ(user_exit.vector, -3);
    CHECK_EQ(user_exit.rax, 0x55534552);
    u64 value;
    __asm__ volatile("mov %%gs:0, %0" : "=r"(value));
    CHECK_EQ(value, 0x4b45524e);
}

TESTS({ "user_address_space", user_address_space }, { "system_call", system_call },
      { "return_from_system_call", return_from_system_call }, { "user_faults", user_faults },
      { "the_kernel_is_not_mapped_for_user", the_kernel_is_not_mapped_for_user },
      { "privileged_instructions_fault", privileged_instructions_fault }, { "gates_by_dpl", gates_by_dpl },
      { "tlb_follows_page_tables", tlb_follows_page_tables }, { "gs_bases_are_swapped", gs_bases_are_swapped });
