/* SPDX-License-Identifier: GPL-2.0-only */
/* The runtime of the test guests. */
#ifndef GUEST_H
#define GUEST_H

#include "xen.h"

#define PAGE_ALIGNED __attribute__((aligned(PAGE_SIZE)))
#define NOINLINE __attribute__((noinline, noclone))
#define barrier() __asm__ volatile("" ::: "memory")
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

extern struct start_info *start_info;
extern u16 boot_cs, boot_ss;                    /* 0xe033 and 0xe02b; in fast mode others, of a lower RPL */
extern struct shared_info *shared;
extern struct vcpu_info *const vcpu0;
extern void run_tests(void);

/* --- tests: each guest defines the list it runs --- */
struct test { const char *name; void (*run)(void); };
extern const struct test tests[];
extern const u32 nr_tests;
#define TESTS(...) const struct test tests[] = { __VA_ARGS__ }; const u32 nr_tests = ARRAY_SIZE(tests)

/* End the current test as failed unless `condition`. */
#define CHECK(condition, ...) do { if (!(condition)) { test_fail(__VA_ARGS__); return; } } while (0)
#define CHECK_EQ(actual, expected) do { \
    u64 a_ = (u64)(actual), e_ = (u64)(expected); \
    if (a_ != e_) { test_fail("line %d: " #actual " is %lx, not %lx", __LINE__, a_, e_); return; } } while (0)
void test_fail(const char *format, ...);

struct regs;
/* --- vCPUs --- */
#define MAX_CPUS 128
#define CPU_STACK_SIZE 8192
/* Which vCPU runs this: by its stack. */
u32 this_cpu(void);
extern struct vcpu_info *vcpu_infos[MAX_CPUS];  /* each vCPU's vcpu_info */
#define this_vcpu() (vcpu_infos[this_cpu()])
u32 nr_cpus(void);                              /* how many the domain may have */
/* Bring a vCPU up at fn(arg), with events off. 0 or -errno. A vCPU whose function returns goes down; brought up again by
   cpu_up() it comes out of cpu_down(). */
s64 cpu_start(u32 cpu, void (*fn)(u64), u64 arg);
s64 cpu_initialise(u32 cpu, void (*fn)(u64), u64 arg);  /* without bringing it up */
s64 cpu_up(u32 cpu);
void cpu_down(void);                            /* the calling one */
int cpu_is_up(u32 cpu);
void cpu_nmi_handler(void (*handler)(struct regs *regs));
s64 send_nmi(u32 cpu);
/* Wait in a loop: relax() is PAUSE; wait_a_little() lets other vCPUs run (SCHEDOP_yield). */
#define relax() __asm__ volatile("pause" ::: "memory")
#define wait_a_little() HC2(sched_op, SCHEDOP_yield, 0)
/* Wait up to a second for a condition; 1 if it came true. */
#define WAIT_FOR(condition) ({ \
    u64 end_ = now_ns() + 10000000000ul; \
    while (!(condition) && now_ns() < end_) \
        wait_a_little(); \
    !!(condition); })
/* Block until the port is pending (it may stay masked), or a time. */
s64 poll_port(u32 port, u64 until_ns);
void block(void);                               /* with events off: wait for one, take it; events are off again */

typedef volatile u32 spinlock;
void spin_lock(spinlock *lock);                 /* PAUSE only */
void yield_lock(spinlock *lock);                /* SCHEDOP_yield */
void spin_unlock(spinlock *lock);

/* --- console --- */
void print(const char *format, ...);
void console_flush(void);
void __attribute__((noreturn)) shutdown(u32 reason);

/* --- memory --- */
void *memset(void *to, int value, u64 size);
void *memcpy(void *to, const void *from, u64 size);
int memcmp(const void *a, const void *b, u64 size);
u64 virt_to_pfn(const void *va);
u64 virt_to_mfn(const void *va);
void *mfn_to_virt(u64 mfn);
volatile u64 *pte_of(const void *va);          /* the L1 entry (mapped read-only) of an address of the kernel */
u64 pte_maddr(const void *va);                  /* its machine address */
s64 remap(const void *va, u64 pte);             /* update_va_mapping with INVLPG */
#define PTE_P 1ul
#define PTE_RW 2ul
#define PTE_US 4ul
#define PTE_A 0x20ul
#define PTE_D 0x40ul
#define PTE_PSE 0x80ul
#define PTE_KERNEL_RW (PTE_P | PTE_RW | PTE_A | PTE_D)
#define PTE_KERNEL_RO (PTE_P | PTE_A | PTE_D)
#define PTE_TABLE (PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D)
#define MADDR(pte) ((pte) & 0x000ffffffffff000ul)

/* --- traps --- */
struct regs {
    u64 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};
struct caught { s64 vector; u64 error, rip, cs, rflags, rsp, cr2; u8 upcall_mask; };
extern struct caught caught;
/* Run fn(arg); if it traps, stop it there and say how in `caught`. The vector, or -1 if it returned. */
s64 catch_trap(void (*fn)(u64), u64 arg);
/* What handles traps that are not caught; the default prints and crashes. */
extern void (*trap_handler)(struct regs *regs);
void traps_init(u8 flags_of_91);                /* flags of the gate of vector 0x91: DPL, 4 to mask events */

/* --- events --- */
extern volatile u64 event_count[4096];
extern u8 port_cpu[4096];                       /* which vCPU takes a port's events; bind_virq and bind_ipi set it */
extern void (*event_hook)(u32 port, struct regs *regs);
void events_on(void);
void events_off(void);
void mask_port(u32 port, int masked);
s64 bind_virq(u32 virq, u32 vcpu);              /* port, or -errno */
s64 bind_ipi(u32 vcpu);
s64 evtchn_port_op(u32 cmd, u32 port);
u64 now_ns(void);

/* --- user mode --- */
/* Enter user mode at rip with rsp, rdi = arg; comes back when user code executes SYSCALL or traps: see user_exit. */
struct user_exit { s64 vector; u64 error, rip, cs, rflags, rsp, rax, rcx, r11, ss; };
extern struct user_exit user_exit;
void run_user(u64 rip, u64 rsp, u64 arg, u64 flags);

/* --- hypercalls --- */
#ifdef PVH
static inline s64 syscall5(u64 nr, u64 a, u64 b, u64 c, u64 d, u64 e)
{
    s64 result;
    register u64 r10 __asm__("r10") = d;
    register u64 r8 __asm__("r8") = e;
    __asm__ volatile("vmcall" : "=a"(result), "+D"(a), "+S"(b), "+d"(c), "+r"(r10), "+r"(r8) : "0"(nr) : "memory");
    return result;
}
#define hypercall syscall5
#else
static inline s64 syscall5(u64 nr, u64 a, u64 b, u64 c, u64 d, u64 e)
{
    s64 result;
    register u64 r10 __asm__("r10") = d;
    register u64 r8 __asm__("r8") = e;
    __asm__ volatile("syscall" : "=a"(result), "+D"(a), "+S"(b), "+d"(c), "+r"(r10), "+r"(r8)
                     : "0"(nr) : "rcx", "r11", "memory");
    return result;
}
/* The same through the hypercall page. */
s64 hypercall(u64 nr, u64 a, u64 b, u64 c, u64 d, u64 e);
#endif
#define HC(name, a, b, c, d, e) hypercall(HC_##name, (u64)(a), (u64)(b), (u64)(c), (u64)(d), (u64)(e))
#define HC1(name, a) HC(name, a, 0, 0, 0, 0)
#define HC2(name, a, b) HC(name, a, b, 0, 0, 0)
#define HC3(name, a, b, c) HC(name, a, b, c, 0, 0)
#define HC4(name, a, b, c, d) HC(name, a, b, c, d, 0)

u64 cmdline_number(const char *name, u64 otherwise);   /* NAME=number on the command line */

#endif
