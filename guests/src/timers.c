/* SPDX-License-Identifier: GPL-2.0-only */
/* Time and timers. Deadlines are lower bounds: a busy host may be late, never early. */
#include "guest.h"

#define MS 1000000ul
#define ETIME 62

static s64 timer;
struct singleshot { u64 timeout; u32 flags; };

static void wait_until(u64 deadline)
{
    while (now_ns() < deadline) {
        struct sched_poll p = { 0, 0, deadline };
        HC2(sched_op, SCHEDOP_poll, &p);
    }
}

/* Wait for an event, up to a second. */
static int fired(u64 seen)
{
    u64 end = now_ns() + 1000 * MS;
    events_on();
    while (event_count[timer] == seen && now_ns() < end) {
        u32 port = timer;
        struct sched_poll p = { (u64)&port, 1, now_ns() + 10 * MS };
        HC2(sched_op, SCHEDOP_poll, &p);
    }
    events_off();
    return event_count[timer] != seen;
}

static void system_time(void)
{
    u64 last = now_ns();
    CHECK(vcpu0->time.version % 2 == 0 && vcpu0->time.version, "time version %u", vcpu0->time.version);
    for (u32 i = 0; i < 20000; i++) {
        u64 now = now_ns();
        CHECK(now >= last, "time went back from %lu to %lu", last, now);
        last = now;
    }
    CHECK(shared->wc_sec > 1600000000 && shared->wc_version % 2 == 0, "wall clock says %u", shared->wc_sec);
    CHECK(shared->wc_nsec < 1000000000, "wall clock nanoseconds %u", shared->wc_nsec);
}

static void periodic_by_default(void)
{
    timer = bind_virq(VIRQ_TIMER, 0);
    CHECK(timer > 0, "bind_virq: %ld", timer);
    CHECK(fired(event_count[timer]), "no tick: a PV guest starts with a 100 Hz timer");
    CHECK_EQ(HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0), 0);
    wait_until(now_ns() + 30 * MS);
    events_on();
    events_off();
    u64 seen = event_count[timer];
    wait_until(now_ns() + 50 * MS);
    events_on();
    events_off();
    CHECK_EQ(event_count[timer], seen);
}

static void set_timer_op(void)
{
    u64 seen = event_count[timer], start = now_ns();
    CHECK_EQ(HC1(set_timer_op, start + 5 * MS), 0);
    CHECK(fired(seen), "no event");
    CHECK(now_ns() >= start + 5 * MS, "early");
    CHECK_EQ(HC1(set_timer_op, now_ns() + 20 * MS), 0);
    CHECK_EQ(HC1(set_timer_op, 0), 0);                  /* 0 stops it */
    seen = event_count[timer];
    wait_until(now_ns() + 40 * MS);
    events_on();
    events_off();
    CHECK_EQ(event_count[timer], seen);
    CHECK_EQ(HC1(set_timer_op, 1), 0);                  /* the past: at once */
    CHECK(fired(seen), "no event for a deadline in the past");
}

static void singleshot(void)
{
    u64 seen = event_count[timer], start = now_ns();
    struct singleshot s = { start + 3 * MS, 0 };
    CHECK_EQ(HC3(vcpu_op, VCPUOP_set_singleshot_timer, 0, &s), 0);
    CHECK(fired(seen), "no event");
    CHECK(now_ns() >= start + 3 * MS, "early");
    s = (struct singleshot){ 1, 1 };                    /* VCPU_SSHOTTMR_future */
    CHECK_EQ(HC3(vcpu_op, VCPUOP_set_singleshot_timer, 0, &s), -ETIME);
    s = (struct singleshot){ now_ns() + 20 * MS, 0 };
    CHECK_EQ(HC3(vcpu_op, VCPUOP_set_singleshot_timer, 0, &s), 0);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_stop_singleshot_timer, 0, 0), 0);
    seen = event_count[timer];
    wait_until(now_ns() + 40 * MS);
    events_on();
    events_off();
    CHECK_EQ(event_count[timer], seen);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_set_singleshot_timer, 0, 0x1000), -EFAULT);
}

static void periodic(void)
{
    u64 period = 4 * MS, seen = event_count[timer], start = now_ns();
    CHECK_EQ(HC3(vcpu_op, VCPUOP_set_periodic_timer, 0, &period), 0);
    for (u32 i = 0; i < 5; i++)
        CHECK(fired(event_count[timer]), "tick %u did not come", i);
    CHECK(now_ns() - start >= 4 * 4 * MS, "five ticks in %lu ns", now_ns() - start);
    CHECK(event_count[timer] - seen >= 5, "only %lu ticks", event_count[timer] - seen);
    u64 too_fast = MS - 1;
    CHECK_EQ(HC3(vcpu_op, VCPUOP_set_periodic_timer, 0, &too_fast), -EINVAL);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_stop_periodic_timer, 0, 0), 0);
}

/* A guest that only computes is interrupted. */
static void preemption(void)
{
    u64 seen = event_count[timer], rounds = 0;
    CHECK_EQ(HC1(set_timer_op, now_ns() + 5 * MS), 0);
    events_on();
    while (event_count[timer] == seen && rounds < 20000000000ul) {
        barrier();
        rounds++;
    }
    events_off();
    CHECK(event_count[timer] != seen, "never interrupted");
}

static void run_states(void)
{
    struct vcpu_runstate_info r;
    CHECK_EQ(HC3(vcpu_op, VCPUOP_get_runstate_info, 0, &r), 0);
    CHECK_EQ(r.state, 0);
    u64 blocked = r.time[2], start = now_ns();
    wait_until(start + 10 * MS);
    CHECK_EQ(HC3(vcpu_op, VCPUOP_get_runstate_info, 0, &r), 0);
    CHECK(r.time[2] - blocked >= 8 * MS, "blocked for %lu ns", r.time[2] - blocked);
    u64 sum = r.time[0] + r.time[1] + r.time[2] + r.time[3];
    CHECK(sum > 0 && sum <= now_ns() + 1000 * MS, "the sum of run states is %lu", sum);
}

TESTS({ "system_time", system_time }, { "periodic_by_default", periodic_by_default }, { "set_timer_op", set_timer_op },
      { "singleshot", singleshot }, { "periodic", periodic }, { "preemption", preemption },
      { "run_states", run_states });
