/* SPDX-License-Identifier: GPL-2.0-only */
/* Text goes to the PV console ring; a reader that does not come is waited for a little, then ignored. */
#include "guest.h"

static struct console_ring *ring(void)
{
    return mfn_to_virt(start_info->console_mfn);
}

static void notify(void)
{
    evtchn_port_op(EVTCHNOP_send, start_info->console_evtchn);
}

static void wait_for_space(struct console_ring *r, u32 wanted)
{
    for (u32 tries = 0; tries < 2000 && 2048 - (r->out_prod - r->out_cons) < wanted; tries++) {
        struct sched_poll poll = { 0, 0, now_ns() + 1000000 };
        HC2(sched_op, SCHEDOP_poll, &poll);
    }
}

static void put(char c)
{
    struct console_ring *r = ring();
    if (r->out_prod - r->out_cons >= 2048) {
        notify();
        wait_for_space(r, 1);
        if (r->out_prod - r->out_cons >= 2048)
            return;
    }
    r->out[r->out_prod & 2047] = c;
    barrier();
    r->out_prod++;
}

void console_flush(void)
{
    notify();
    wait_for_space(ring(), 2048);
}

static void put_number(u64 value, u32 base, int width, char pad)
{
    char digits[24];
    int n = 0;
    do {
        digits[n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    for (; width > n; width--)
        put(pad);
    while (n)
        put(digits[--n]);
}

static void print_va(const char *format, __builtin_va_list args)
{
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        int width = 0, wide = 0;
        char pad = ' ';
        if (*++format == '0')
            pad = '0';
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + *format - '0';
        for (; *format == 'l'; format++)
            wide = 1;
        switch (*format) {
        case 's': {
            const char *s = __builtin_va_arg(args, const char *);
            while (*s)
                put(*s++);
            break;
        }
        case 'c':
            put((char)__builtin_va_arg(args, int));
            break;
        case 'd': {
            s64 v = wide ? __builtin_va_arg(args, s64) : __builtin_va_arg(args, int);
            if (v < 0) {
                put('-');
                v = -v;
            }
            put_number((u64)v, 10, width, pad);
            break;
        }
        case 'u':
            put_number(wide ? __builtin_va_arg(args, u64) : __builtin_va_arg(args, u32), 10, width, pad);
            break;
        case 'x':
            put_number(wide ? __builtin_va_arg(args, u64) : __builtin_va_arg(args, u32), 16, width, pad);
            break;
        default:
            put(*format);
        }
    }
}

static spinlock lock;
static u32 owner;                               /* vCPU + 1: a trap within print() may print */

void print(const char *format, ...)
{
    __builtin_va_list args;
    u32 me = this_cpu() + 1, mine = owner == me;
    if (!mine) {
        yield_lock(&lock);
        owner = me;
    }
    __builtin_va_start(args, format);
    print_va(format, args);
    __builtin_va_end(args);
    notify();
    if (!mine) {
        owner = 0;
        spin_unlock(&lock);
    }
}

static const char *current;
static int failed;
static u32 passes, failures;

void test_fail(const char *format, ...)
{
    __builtin_va_list args;
    __builtin_va_start(args, format);
    print("FAIL %s: ", current);
    print_va(format, args);
    print("\n");
    __builtin_va_end(args);
    failed = 1;
}

void run_tests(void)
{
    for (u32 i = 0; i < nr_tests; i++) {
        current = tests[i].name;
        failed = 0;
        tests[i].run();
        if (failed)
            failures++;
        else {
            passes++;
            print("PASS %s\n", current);
        }
    }
    print("DONE %u passed, %u failed\n", passes, failures);
}
