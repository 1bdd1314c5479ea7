/* SPDX-License-Identifier: GPL-2.0-only */
/* Event channels as a guest uses them: binding, masks, upcalls, polling, blocking. */
#include "guest.h"

static void ipi_to_self(void)
{
    s64 port = bind_ipi(0);
    CHECK(port > 0, "bind_ipi: %ld", port);
    events_on();
    for (u32 i = 1; i <= 1000; i++) {
        CHECK_EQ(evtchn_port_op(EVTCHNOP_send, port), 0);
        CHECK_EQ(event_count[port], i);
    }
    events_off();
    CHECK_EQ(evtchn_port_op(EVTCHNOP_close, port), 0);
    event_count[port] = 0;
}

static void the_upcall_mask_holds_events_back(void)
{
    s64 port = bind_ipi(0);
    events_off();
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, port), 0);
    CHECK_EQ(event_count[port], 0);
    CHECK_EQ(vcpu0->upcall_pending, 1);
    CHECK_EQ(shared->pending[port / 64] >> port % 64 & 1, 1);
    events_on();
    CHECK_EQ(event_count[port], 1);
    events_off();
    evtchn_port_op(EVTCHNOP_close, port);
    event_count[port] = 0;
}

static void a_masked_port_waits_for_unmask(void)
{
    s64 port = bind_ipi(0);
    events_on();
    mask_port(port, 1);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, port), 0);
    CHECK_EQ(event_count[port], 0);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_unmask, port), 0);
    CHECK_EQ(event_count[port], 1);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_unmask, port), 0);
    CHECK_EQ(event_count[port], 1);
    events_off();
    evtchn_port_op(EVTCHNOP_close, port);
    event_count[port] = 0;
}

/* In the handler events are masked; another one is delivered when it returns. */
static u32 depth, deepest, hook_port, sends_left;

static void send_again(u32 port, struct regs *regs)
{
    if (port != hook_port)
        return;
    if (++depth > deepest)
        deepest = depth;
    if (sends_left && sends_left--)
        evtchn_port_op(EVTCHNOP_send, port);
    depth--;
}

static void handlers_do_not_nest(void)
{
    s64 port = bind_ipi(0);
    hook_port = port;
    sends_left = 5;
    event_hook = send_again;
    events_on();
    evtchn_port_op(EVTCHNOP_send, port);
    CHECK_EQ(event_count[port], 6);
    CHECK_EQ(deepest, 1);
    event_hook = 0;
    events_off();
    evtchn_port_op(EVTCHNOP_close, port);
    event_count[port] = 0;
}

static void registers_survive_an_upcall(void)
{
    s64 port = bind_ipi(0);
    events_on();
    u64 a, b, c, d;
    __asm__ volatile("mov $11, %%rbx\n mov $12, %%r12\n mov $13, %%r15\n mov $14, %%r8\n"
                     "mov %4, %%eax\n mov %5, %%edi\n mov %6, %%rsi\n syscall\n"
                     "mov %%rbx, %0\n mov %%r12, %1\n mov %%r15, %2\n mov %%r8, %3"
                     : "=&D"(a), "=&S"(b), "=&d"(c), "=&a"(d)
                     : "i"(HC_event_channel_op), "i"(EVTCHNOP_send), "r"(&port)
                     : "rbx", "rcx", "r8", "r11", "r12", "r15", "memory");
    CHECK_EQ(event_count[port], 1);
    CHECK(a == 11 && b == 12 && c == 13 && d == 14, "%lu %lu %lu %lu", a, b, c, d);
    events_off();
    evtchn_port_op(EVTCHNOP_close, port);
    event_count[port] = 0;
}

struct status { u16 dom, pad; u32 port, status, vcpu, u[2]; };

static s64 status_of(u32 port, struct status *s)
{
    *s = (struct status){ DOMID_SELF, 0, port, 99, 99, { 0, 0 } };
    return HC2(event_channel_op, EVTCHNOP_status, s);
}

static void loopback(void)
{
    struct { u16 dom, remote; u32 port; } unbound = { DOMID_SELF, DOMID_SELF, 0 };
    struct { u16 remote, pad; u32 remote_port, port; } bind = { DOMID_SELF, 0, 0, 0 };
    struct status s;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_alloc_unbound, &unbound), 0);
    CHECK_EQ(status_of(unbound.port, &s), 0);
    CHECK_EQ(s.status, 1);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, unbound.port), 0);   /* goes nowhere */
    bind.remote_port = unbound.port;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_bind_interdomain, &bind), 0);
    CHECK_EQ(status_of(bind.port, &s), 0);
    CHECK_EQ(s.status, 2);
    CHECK_EQ(s.u[1], unbound.port);
    events_on();
    CHECK_EQ(event_count[bind.port], 1);                        /* binding always sets it */
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, bind.port), 0);
    CHECK_EQ(event_count[unbound.port], 1);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_close, bind.port), 0);
    CHECK_EQ(status_of(unbound.port, &s), 0);
    CHECK_EQ(s.status, 1);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_close, unbound.port), 0);
    CHECK_EQ(status_of(unbound.port, &s), 0);
    CHECK_EQ(s.status, 0);
    events_off();
    event_count[bind.port] = event_count[unbound.port] = 0;
}

static void bad_requests(void)
{
    struct { u16 dom, remote; u32 port; } unbound = { 0, DOMID_SELF, 0 };
    struct { u16 remote, pad; u32 remote_port, port; } bind = { 0, 0, 1, 0 };
    struct { u32 pirq, flags, port; } pirq = { 1, 0, 0 };
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_alloc_unbound, &unbound), -EPERM);
    unbound.dom = 4711;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_alloc_unbound, &unbound), -ESRCH);
    bind.remote = 4711;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_bind_interdomain, &bind), -ESRCH);
    bind.remote = DOMID_SELF;
    bind.remote_port = 3000;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_bind_interdomain, &bind), -EINVAL);
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_bind_pirq, &pirq), -EPERM);
    CHECK_EQ(bind_ipi(1000), -ENOENT);
    CHECK_EQ(bind_virq(VIRQ_TIMER, 1000), -ENOENT);
    CHECK_EQ(bind_virq(VIRQ_CONSOLE, 1), -EINVAL);
    CHECK_EQ(bind_virq(24, 0), -EINVAL);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, 0), -EINVAL);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, 3000), -EINVAL);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, 0xffffffff), -EINVAL);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_close, 3000), -EINVAL);
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_send, 0x1000), -EFAULT);
    CHECK_EQ(HC2(event_channel_op, 77, 0), -ENOSYS);
    u16 dom0 = 0;
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_reset, &dom0), -EPERM);
    s64 port = bind_virq(VIRQ_DEBUG, 0);
    CHECK(port > 0, "bind_virq: %ld", port);
    CHECK_EQ(bind_virq(VIRQ_DEBUG, 0), -EEXIST);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, port), -EINVAL);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_close, port), 0);
}

static void ports_run_out_and_come_back(void)
{
    static u32 ports[4096];
    u32 count = 0;
    s64 port;
    while ((port = bind_ipi(0)) > 0 && count < 4096)
        ports[count++] = port;
    CHECK_EQ(port, -ENOSPC);
    CHECK(count > 100, "only %u ports", count);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, ports[count - 1]), 0);
    CHECK_EQ(shared->pending[ports[count - 1] / 64] >> ports[count - 1] % 64 & 1, 1);
    for (u32 i = 0; i < count; i++)
        CHECK_EQ(evtchn_port_op(EVTCHNOP_close, ports[i]), 0);
    CHECK_EQ(shared->pending[ports[count - 1] / 64] >> ports[count - 1] % 64 & 1, 0);
    events_on();                                    /* take what is left */
    events_off();
}

static s64 poll(u32 *ports, u32 count, u64 timeout)
{
    struct sched_poll p = { (u64)ports, count, timeout };
    return HC2(sched_op, SCHEDOP_poll, &p);
}

static void polling(void)
{
    u32 port = bind_ipi(0);
    events_off();
    mask_port(port, 1);
    CHECK_EQ(evtchn_port_op(EVTCHNOP_send, port), 0);
    CHECK_EQ(poll(&port, 1, 0), 0);                 /* pending already: returns at once, masked or not */
    __atomic_fetch_and(&shared->pending[port / 64], ~(1ul << port % 64), __ATOMIC_SEQ_CST);
    u64 start = now_ns();
    u32 wakes = 0;
    while (now_ns() < start + 5000000) {            /* any event of the vCPU may end a poll early */
        CHECK_EQ(poll(&port, 1, start + 5000000), 0);
        wakes++;
    }
    CHECK(wakes < 100, "woke %u times in 5 ms", wakes);
    u32 bad = 5000;
    CHECK_EQ(poll(&bad, 1, 0), -EINVAL);
    CHECK_EQ(poll(&port, 129, 0), -EINVAL);
    CHECK_EQ(poll((u32 *)0x1000, 1, 0), -EFAULT);
    events_on();                                    /* take what is left */
    events_off();
    mask_port(port, 0);
    evtchn_port_op(EVTCHNOP_close, port);
}

static void blocking(void)
{
    s64 timer = bind_virq(VIRQ_TIMER, 0);
    CHECK(timer > 0, "bind_virq: %ld", timer);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0), 0);
    events_on();                                        /* a tick may have come between the two */
    for (u32 i = 0; i < 20; i++) {
        events_off();
        u64 start = now_ns(), seen = event_count[timer];
        struct { u64 timeout; u32 flags; } when = { start + 2000000, 0 };
        CHECK_EQ(HC3(vcpu_op, VCPUOP_set_singleshot_timer, 0, &when), 0);
        while (event_count[timer] == seen)
            HC2(sched_op, SCHEDOP_block, 0);        /* unmasks events, and blocks if there are none */
        CHECK_EQ(vcpu0->upcall_mask, 0);
        CHECK(now_ns() - start >= 2000000, "woke after %lu ns", now_ns() - start);
    }
    events_off();
    evtchn_port_op(EVTCHNOP_close, timer);
}

static void old_hypercall(void)
{
    struct { u32 cmd, vcpu, port; } op = { EVTCHNOP_bind_ipi, 0, 0 };
    CHECK_EQ(HC1(event_channel_op_compat, &op), 0);
    CHECK(op.port > 0, "no port");
    struct { u32 cmd, port; } close = { EVTCHNOP_close, op.port };
    CHECK_EQ(HC1(event_channel_op_compat, &close), 0);
    close.cmd = EVTCHNOP_reset;
    CHECK_EQ(HC1(event_channel_op_compat, &close), -ENOSYS);
}

static void fifo_is_not_there_yet(void)
{
    struct { u64 gfn; u32 offset, vcpu; u8 bits, pad[7]; } op = { virt_to_mfn(start_info), 0, 0, 0, { 0 } };
    CHECK_EQ(HC2(event_channel_op, EVTCHNOP_init_control, &op), -ENOSYS);
}

TESTS({ "ipi_to_self", ipi_to_self }, { "the_upcall_mask_holds_events_back", the_upcall_mask_holds_events_back },
      { "a_masked_port_waits_for_unmask", a_masked_port_waits_for_unmask },
      { "handlers_do_not_nest", handlers_do_not_nest },
      { "registers_survive_an_upcall", registers_survive_an_upcall }, { "loopback", loopback },
      { "bad_requests", bad_requests }, { "ports_run_out_and_come_back", ports_run_out_and_come_back },
      { "polling", polling }, { "blocking", blocking }, { "old_hypercall", old_hypercall },
      { "fifo_is_not_there_yet", fifo_is_not_there_yet });
