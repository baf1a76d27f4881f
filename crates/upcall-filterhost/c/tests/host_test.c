/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What a filter host promises to the worker and to the filter, each promise a test.
 *
 *   host_test FILTER HOST    with the host in a process of its own
 *   host_test FILTER         inline
 *
 * Every test runs in a process of its own, with a time limit. A name as last argument
 * runs that test alone.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "fakeworker.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <upcall/filter.h>

#include "testfilter.h"

static const char *filter;

static struct wire_completion verdict_of(struct fake_worker *w, uint32_t block, uint8_t op) {
    return expect(w, 0, WIRE_VERDICT, submit(w, 0, start_of(block, op)));
}

static void check_verdict(struct wire_completion out, uint32_t code, int32_t status) {
    CHECK_IS(out.kind, WIRE_VERDICT);
    CHECK_IS(out.code, code);
    CHECK_IS(out.status, status);
}

static struct wire_completion after_hold(struct fake_worker *w, uint32_t block) {
    uint64_t token = submit(w, 0, start_of(block, UPCALL_WRITE));
    struct wire_completion held = expect(w, 0, WIRE_HELD, token);
    CHECK(held.cookie != 0);
    return expect(w, 0, WIRE_VERDICT, token);
}

static bool comes_nothing(struct fake_worker *w) {
    struct wire_completion out;
    return !reap(w, 0, 20, &out) && !reap(w, 1, 0, &out);
}

static int close_instance(struct fake_worker *w, uint32_t number) {
    return worker_say(w, WIRE_MSG_CLOSE, number, 0, NULL, 0, NULL, 0);
}

static void end_well(struct fake_worker *w) {
    CHECK(comes_nothing(w));
    CHECK_IS(close_instance(w, 0), 0);
    CHECK(strstr(w->logs, "closed"));
    worker_quit(w);
    if (w->host_path)
        CHECK(strstr(w->logs, "unloaded"));
}

static uint64_t counter(struct fake_worker *w, const char *name) {
    for (uint32_t i = 0; i < WIRE_COUNTERS; i++)
        if (strcmp(w->counters[i].name, name) == 0)
            return w->counters[i].value;
    CHECK(!"there is no such counter");
    return 0;
}

/* ---- verdicts ---- */

static void each_verdict_comes_back_as_the_filter_gave_it(void) {
    struct fake_worker *w = worker_ready(filter);
    check_verdict(verdict_of(w, T_PASS, UPCALL_WRITE), UPCALL_PASS, 0);
    check_verdict(verdict_of(w, T_DONE, UPCALL_READ), UPCALL_DONE, 0);
    check_verdict(verdict_of(w, T_FAIL, UPCALL_WRITE), UPCALL_FAIL, -ENOSPC);
    CHECK_IS(counter(w, "requests"), 3);
    end_well(w);
}

static void a_watched_request_comes_back_with_its_context(void) {
    struct fake_worker *w = worker_ready(filter);
    struct wire_completion out = verdict_of(w, T_WATCH, UPCALL_WRITE);
    check_verdict(out, UPCALL_WATCH, 0);
    CHECK_IS(out.cookie, 0x1200);
    struct wire_submission done = start_of(T_WATCH, UPCALL_WRITE);
    done.kind = WIRE_DONE;
    done.cookie = out.cookie;
    done.status = -EIO;
    check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, done)), UPCALL_PASS, -EIO);
    end_well(w);
}

static void on_the_way_up_the_filter_may_change_the_status_and_hold(void) {
    struct fake_worker *w = worker_ready(filter);
    struct wire_submission done = start_of(T_DONE_STATUS, UPCALL_READ);
    done.kind = WIRE_DONE;
    check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, done)), UPCALL_PASS, -EDOM);
    done.offset = T_DONE_FAIL * 4096;
    check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, done)), UPCALL_FAIL, -EXDEV);
    done.offset = T_DONE_HOLD * 4096;
    uint64_t token = submit(w, 0, done);
    expect(w, 0, WIRE_HELD, token);
    check_verdict(expect(w, 0, WIRE_VERDICT, token), UPCALL_PASS, 0);
    end_well(w);
}

static void a_verdict_that_is_none_reaches_the_worker_as_none(void) {
    struct fake_worker *w = worker_ready(filter);
    CHECK(verdict_of(w, T_NONSENSE, UPCALL_WRITE).code > UPCALL_HOLD);
    end_well(w);
}

static void an_instance_that_is_not_open_gets_its_requests_failed(void) {
    struct fake_worker *w = worker_ready(filter);
    struct wire_submission start = start_of(T_PASS, UPCALL_WRITE);
    for (int i = 0; i < 3; i++) {
        struct wire_completion out;
        start.instance = (uint32_t[]){ 1, 4095, UINT32_MAX }[i];
        submit(w, 0, start);
        CHECK(reap(w, 0, 5000, &out));
        check_verdict(out, UPCALL_FAIL, -ESHUTDOWN);
        CHECK(out.instance == start.instance);
    }
    start.kind = WIRE_CANCEL;
    submit(w, 0, start);
    start.kind = WIRE_ISSUED;
    submit(w, 0, start);
    start.kind = 77;
    submit(w, 0, start);
    end_well(w);
}

/* ---- holding ---- */

static void a_held_request_is_announced_before_another_thread_answers_it(void) {
    struct fake_worker *w = worker_ready(filter);
    check_verdict(after_hold(w, T_OTHER_THREAD), UPCALL_PASS, 0);
    check_verdict(after_hold(w, T_TIMER), UPCALL_DONE, 0);
    struct wire_completion out = after_hold(w, T_BLOCKING);
    check_verdict(out, UPCALL_WATCH, 0);
    struct wire_submission done = start_of(T_BLOCKING, UPCALL_WRITE);
    done.kind = WIRE_DONE;
    done.cookie = out.cookie;
    check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, done)), UPCALL_DONE, 0);
    end_well(w);
}

static void a_watched_descriptor_calls_the_filter(void) {
    struct fake_worker *w = worker_ready(filter);
    uint64_t token = submit(w, 0, start_of(T_FD_WATCH, UPCALL_WRITE));
    struct wire_completion out;
    CHECK(reap(w, 0, 5000, &out));
    if (out.kind == WIRE_HELD) /* the watch may be faster than the return */
        CHECK(reap(w, 0, 5000, &out));
    check_verdict(out, UPCALL_PASS, 0);
    CHECK(out.token == token);
    end_well(w);
}

static void an_answer_before_the_callback_returns_is_the_verdict(void) {
    struct fake_worker *w = worker_ready(filter);
    check_verdict(verdict_of(w, T_EARLY, UPCALL_WRITE), UPCALL_FAIL, -ENOTEMPTY);
    check_verdict(verdict_of(w, T_EARLY_THREAD, UPCALL_WRITE), UPCALL_PASS, 0);
    end_well(w);
}

static void an_answer_and_a_verdict_are_one_verdict_and_a_line_in_the_log(void) {
    struct fake_worker *w = worker_ready(filter);
    check_verdict(verdict_of(w, T_EARLY_AND_PASS, UPCALL_WRITE), UPCALL_FAIL, -ENOTEMPTY);
    CHECK(comes_nothing(w));
    CHECK_IS(close_instance(w, 0), 0);
    CHECK(strstr(w->logs, "then returned verdict 0"));
    worker_quit(w);
}

static void a_second_answer_is_noticed_and_changes_nothing(void) {
    struct fake_worker *w = worker_ready(filter);
    check_verdict(after_hold(w, T_TWICE), UPCALL_PASS, 0);
    end_well(w);
    CHECK(strstr(w->logs, "answered a request that it does not hold"));
}

static void an_answer_that_races_with_the_hold_is_never_lost_or_doubled(void) {
    struct fake_worker *w = worker_ready(filter);
    for (int i = 0; i < 400; i++) {
        uint64_t token = submit(w, 0, start_of(T_RACING_THREAD, UPCALL_WRITE));
        struct wire_completion out;
        CHECK(reap(w, 0, 5000, &out));
        if (out.kind == WIRE_HELD) {
            CHECK(out.token == token);
            CHECK(reap(w, 0, 5000, &out));
        }
        CHECK(out.token == token);
        check_verdict(out, UPCALL_PASS, 0);
    }
    end_well(w);
}

static void cancel_reaches_the_filter_with_the_context_of_the_held_request(void) {
    struct fake_worker *w = worker_ready(filter);
    struct wire_submission start = start_of(T_HOLD_UNTIL_CANCEL, UPCALL_WRITE);
    uint64_t token = submit(w, 0, start);
    struct wire_completion held = expect(w, 0, WIRE_HELD, token);
    CHECK(comes_nothing(w));
    start.kind = WIRE_CANCEL;
    start.token = token;
    start.cookie = held.cookie;
    submit(w, 0, start);
    check_verdict(expect(w, 0, WIRE_VERDICT, token), UPCALL_FAIL, -ECANCELED);
    CHECK_IS(counter(w, "cancels"), 1);
    end_well(w);
}

/* ---- data ---- */

static void the_filter_changes_data_in_the_arena(void) {
    struct fake_worker *w = worker_ready(filter);
    memset(w->arena + 8192, 0x5a, 512);
    struct wire_submission start = start_of(T_INVERT, UPCALL_WRITE);
    start.data = 8192;
    check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, start)), UPCALL_PASS, 0);
    CHECK_IS(w->arena[8192], 0xa5);
    CHECK_IS(w->arena[8192 + 511], 0xa5);
    CHECK_IS(w->arena[8192 + 512], 0);
    end_well(w);
}

static void data_outside_the_arena_is_refused_and_no_data_is_null(void) {
    struct fake_worker *w = worker_ready(filter);
    struct wire_submission start = start_of(T_SEES, UPCALL_WRITE);
    check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, start)), UPCALL_FAIL, -ENODATA);
    const uint64_t outside[] = { ARENA_SIZE, ARENA_SIZE - 511, UINT64_MAX - 1, UINT64_MAX - 512,
                                 UINT64_C(1) << 32 };
    for (size_t i = 0; i < sizeof(outside) / sizeof(*outside); i++) {
        start.data = outside[i];
        check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, start)), UPCALL_FAIL, -EFAULT);
    }
    start.data = ARENA_SIZE - 512;
    w->arena[ARENA_SIZE - 512] = 77;
    check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, start)), UPCALL_FAIL, -77);
    end_well(w);
}

static void writing_to_a_read_only_arena_faults_in_the_host_alone(void) {
    if (!fake_host_path)
        return;
    struct fake_worker *w = worker_start(filter);
    worker_prepare(w, 64, false);
    CHECK_IS(worker_open(w, 0, "a"), 0);
    CHECK_IS(worker_say(w, WIRE_MSG_START, 0, 0, NULL, 0, NULL, 0), 0);
    struct wire_submission start = start_of(T_SEES, UPCALL_WRITE);
    start.data = 0;
    w->arena[0] = 9;
    check_verdict(expect(w, 0, WIRE_VERDICT, submit(w, 0, start)), UPCALL_FAIL, -9);
    start.offset = T_INVERT * 4096;
    submit(w, 0, start);
    int status;
    CHECK_IS(waitpid(w->pid, &status, 0), w->pid);
    CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) != 0); /* SIGSEGV; a sanitizer exits */
    CHECK_IS(w->arena[0], 9);
}

/* ---- issued requests ---- */

static struct wire_submission issued(uint64_t token, int32_t status) {
    return (struct wire_submission){ .kind = WIRE_ISSUED, .token = token, .status = status,
                                     .data = WIRE_NO_DATA };
}

static void an_issued_request_goes_down_and_its_end_comes_back(void) {
    struct fake_worker *w = worker_ready(filter);
    uint64_t token = submit(w, 0, start_of(T_ISSUE, UPCALL_READ));
    struct wire_completion first, second;
    CHECK(reap(w, 0, 5000, &first) && reap(w, 0, 5000, &second));
    struct wire_completion issue = first.kind == WIRE_ISSUE ? first : second;
    CHECK_IS(first.kind == WIRE_ISSUE ? second.kind : first.kind, WIRE_HELD);
    CHECK_IS(issue.kind, WIRE_ISSUE);
    CHECK_IS(issue.code, UPCALL_READ);
    CHECK_IS(issue.offset, 65536);
    CHECK_IS(issue.length, 512);
    CHECK_IS(issue.disk, 0);
    CHECK(issue.data <= ISSUE_ARENA_SIZE - 512);
    memcpy(w->issue_arena + issue.data, "below", 5);
    submit(w, 0, issued(issue.token, 0));
    check_verdict(expect(w, 0, WIRE_VERDICT, token), UPCALL_DONE, 0);
    submit(w, 0, issued(issue.token, 0)); /* a second end is none */
    CHECK(comes_nothing(w));
    /* Nor is it the end of the next one, which has the same place. */
    uint64_t next = submit(w, 0, start_of(T_ISSUE, UPCALL_READ));
    CHECK(reap(w, 0, 5000, &first) && reap(w, 0, 5000, &second));
    submit(w, 0, issued(issue.token, 0));
    CHECK(comes_nothing(w));
    submit(w, 0, issued(first.kind == WIRE_ISSUE ? first.token : second.token, -EIO));
    check_verdict(expect(w, 0, WIRE_VERDICT, next), UPCALL_FAIL, -EIO);
    end_well(w);
    CHECK(strstr(w->logs, "ended a request that was not issued"));
}

/* The filter issues all the flushes it may; their tokens go into @issues. */
static void flood(struct fake_worker *w, uint64_t issues[256]) {
    uint64_t token = submit(w, 0, start_of(T_FLOOD, UPCALL_WRITE));
    uint32_t count = 0, verdicts = 0;
    while (count < 256 || !verdicts) {
        struct wire_completion out;
        CHECK(reap(w, 0, 5000, &out));
        if (out.kind == WIRE_ISSUE) {
            CHECK(count < 256 && out.code == UPCALL_FLUSH);
            issues[count++] = out.token;
        } else {
            CHECK(out.token == token);
            check_verdict(out, UPCALL_FAIL, -256);
            verdicts++;
        }
    }
}

static void at_most_256_issued_requests_are_in_flight_and_each_ends_once(void) {
    struct fake_worker *w = worker_start(filter);
    worker_prepare(w, 1024, true);
    CHECK_IS(worker_open(w, 0, "a"), 0);
    CHECK_IS(worker_say(w, WIRE_MSG_START, 0, 0, NULL, 0, NULL, 0), 0);
    uint64_t issues[256];
    flood(w, issues);
    CHECK(comes_nothing(w));
    struct wire_completion out;
    for (uint32_t i = 0; i < 256; i++)
        submit(w, i % 2, issued(issues[i], i % 3 ? 0 : -EIO));
    for (int i = 0; i < 100; i++) {
        out = verdict_of(w, T_FLOOD_BACK, UPCALL_WRITE);
        if (out.status == -256)
            break;
        sleep_ms(10);
    }
    check_verdict(out, UPCALL_FAIL, -256);
    end_well(w);
}

static void a_full_completion_ring_loses_nothing(void) {
    struct fake_worker *w = worker_start(filter);
    worker_prepare(w, 4, true);
    CHECK_IS(worker_open(w, 0, "a"), 0);
    CHECK_IS(worker_say(w, WIRE_MSG_START, 0, 0, NULL, 0, NULL, 0), 0);
    /* 256 issued requests through a ring of 4; inline, on the thread that must empty it. */
    uint64_t issues[256];
    flood(w, issues);
    for (uint32_t i = 0; i < 256; i++)
        submit(w, 0, issued(issues[i], 0));
    /* And held requests whose answers find it full. */
    uint64_t tokens[6]; /* so few that submitting them never waits for us */
    for (int i = 0; i < 6; i++)
        tokens[i] = submit(w, 0, start_of(T_OTHER_THREAD, UPCALL_WRITE));
    sleep_ms(50);
    for (uint32_t verdicts = 0; verdicts < 6;) { /* one answered in time has no HELD */
        struct wire_completion out;
        CHECK(reap(w, 0, 5000, &out));
        verdicts += out.kind == WIRE_VERDICT && out.token >= tokens[0] && out.token <= tokens[5];
    }
    /* And held requests that are answered from within a callback. */
    for (int i = 0; i < 10; i++) {
        tokens[0] = submit(w, 0, start_of(T_KEEP, UPCALL_WRITE));
        expect(w, 0, WIRE_HELD, tokens[0]);
    }
    submit(w, 0, start_of(T_RELEASE, UPCALL_WRITE));
    for (uint32_t i = 0; i < 11; i++) {
        struct wire_completion out;
        CHECK(reap(w, 0, 5000, &out));
        CHECK(out.kind == WIRE_VERDICT);
    }
    end_well(w);
}

/* ---- services and events ---- */

static void the_services_keep_their_promises(void) {
    struct fake_worker *w = worker_ready(filter);
    sleep_ms(20); /* a timer of 1 ms must have run */
    check_verdict(verdict_of(w, T_SERVICES, UPCALL_WRITE), UPCALL_DONE, 0);
    char line[6] = { 0 };
    CHECK(pread(w->file_fd, line, 5, 0) == 5 && strcmp(line, "line\n") == 0);
    end_well(w);
}

static void counters_lose_no_count_between_threads(void) {
    struct fake_worker *w = worker_ready(filter);
    for (int i = 0; i < 20; i++)
        submit(w, (uint32_t)i % 2, start_of(T_FEED, UPCALL_WRITE));
    for (int i = 0, verdicts = 0; verdicts < 20; i++) {
        struct wire_completion out;
        CHECK(i < 40000);
        verdicts += reap(w, (uint32_t)i % 2, 1, &out) && out.kind == WIRE_VERDICT;
    }
    CHECK_IS(counter(w, "requests"), 20 * 20001);
    end_well(w);
}

static void a_flood_of_log_lines_is_cut_and_the_cut_is_said(void) {
    struct fake_worker *w = worker_ready(filter);
    check_verdict(verdict_of(w, T_LOG_FLOOD, UPCALL_WRITE), UPCALL_PASS, 0);
    sleep_ms(1100); /* the bound is per second */
    end_well(w);
    CHECK(w->log_lines <= 210);
    CHECK(strstr(w->logs, "lines of the log were dropped"));
}

static void an_event_reaches_the_filter_and_may_be_refused(void) {
    struct fake_worker *w = worker_ready(filter);
    uint32_t stun = UPCALL_EVENT_STUN, other = UPCALL_EVENT_UNSTUN;
    CHECK_IS(worker_say(w, WIRE_MSG_EVENT, 0, 0, &stun, 4, NULL, 0), 0);
    CHECK_IS(worker_say(w, WIRE_MSG_EVENT, 0, 0, &other, 4, NULL, 0), -EBUSY);
    CHECK(strstr(w->text, "testfilter"));
    CHECK_IS(worker_say(w, WIRE_MSG_EVENT, 5, 0, &stun, 4, NULL, 0), -ENOENT);
    end_well(w);
}

/* ---- open and close ---- */

static void an_instance_that_refuses_to_open_says_why_and_may_try_again(void) {
    struct fake_worker *w = worker_start(filter);
    worker_prepare(w, 64, true);
    CHECK_IS(worker_open(w, 0, "refuse"), -EACCES);
    CHECK(strstr(w->text, "open() of filter testfilter") && strstr(w->logs, "refused as told"));
    CHECK_IS(worker_open(w, 0, "a"), 0);
    CHECK_IS(worker_open(w, 0, "a"), -EEXIST);
    CHECK_IS(worker_open(w, 4096, "a"), -EEXIST);
    CHECK_IS(worker_say(w, WIRE_MSG_START, 0, 0, NULL, 0, NULL, 0), 0);
    check_verdict(verdict_of(w, T_PASS, UPCALL_WRITE), UPCALL_PASS, 0);
    end_well(w);
}

static void an_instance_may_close_and_open_while_others_serve(void) {
    struct fake_worker *w = worker_ready(filter);
    struct wire_submission start = start_of(T_PASS, UPCALL_WRITE);
    start.instance = 7;
    for (int i = 0; i < 20; i++) {
        struct wire_completion out;
        CHECK_IS(worker_open(w, 7, "a"), 0);
        submit(w, 1, start);
        CHECK(reap(w, 1, 5000, &out));
        check_verdict(out, UPCALL_PASS, 0);
        CHECK_IS(close_instance(w, 7), 0);
        CHECK_IS(close_instance(w, 7), -ENOENT);
        submit(w, 1, start);
        CHECK(reap(w, 1, 5000, &out));
        check_verdict(out, UPCALL_FAIL, -ESHUTDOWN);
        check_verdict(verdict_of(w, T_PASS, UPCALL_WRITE), UPCALL_PASS, 0);
    }
    end_well(w);
}

static void *say_close(void *arg) {
    return (void *)(intptr_t)close_instance(arg, 0);
}

static void close_waits_for_requests_issued_ones_and_blocking_work(void) {
    struct fake_worker *w = worker_ready(filter);
    struct wire_submission start = start_of(T_HOLD_UNTIL_CANCEL, UPCALL_WRITE);
    start.token = submit(w, 0, start);
    start.cookie = expect(w, 0, WIRE_HELD, start.token).cookie;
    uint64_t token = submit(w, 0, start_of(T_ISSUE, UPCALL_READ));
    struct wire_completion out, issue = { 0 };
    for (int i = 0; i < 2; i++) {
        CHECK(reap(w, 0, 5000, &out));
        if (out.kind == WIRE_ISSUE)
            issue = out;
    }
    check_verdict(verdict_of(w, T_WORK, UPCALL_WRITE), UPCALL_PASS, 0);
    submit(w, 0, start_of(T_ISSUE_ONE, UPCALL_WRITE));
    struct wire_completion flush = { 0 };
    for (int i = 0; i < 2; i++) {
        CHECK(reap(w, 0, 5000, &out));
        if (out.kind == WIRE_ISSUE)
            flush = out;
    }

    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, say_close, w) == 0);
    sleep_ms(30);
    CHECK_IS(pthread_tryjoin_np(thread, NULL), EBUSY);
    start.kind = WIRE_CANCEL;
    submit(w, 0, start);
    check_verdict(expect(w, 0, WIRE_VERDICT, start.token), UPCALL_FAIL, -ECANCELED);
    sleep_ms(10);
    CHECK_IS(pthread_tryjoin_np(thread, NULL), EBUSY);
    memcpy(w->issue_arena + issue.data, "below", 5);
    submit(w, 0, issued(issue.token, 0));
    check_verdict(expect(w, 0, WIRE_VERDICT, token), UPCALL_DONE, 0);
    sleep_ms(60); /* the blocking work is over too: what is left was issued */
    CHECK_IS(pthread_tryjoin_np(thread, NULL), EBUSY);
    submit(w, 0, issued(flush.token, 0));
    void *result;
    CHECK(pthread_join(thread, &result) == 0 && !result);
    CHECK(strstr(w->logs, "closed"));
    CHECK_IS(counter(w, "worked"), 1); /* the 50 ms of blocking work are over */
    worker_quit(w);
}

static void when_the_worker_is_gone_everything_ends_in_order(void) {
    struct fake_worker *w = worker_ready(filter);
    expect(w, 0, WIRE_HELD, submit(w, 0, start_of(T_HOLD_UNTIL_CANCEL, UPCALL_WRITE)));
    submit(w, 0, start_of(T_ISSUE, UPCALL_READ));
    struct wire_completion out;
    CHECK(reap(w, 0, 5000, &out) && reap(w, 0, 5000, &out));
    uint64_t begin = now_ms();
    close(w->socket);
    worker_expect_end(w, 0);
    CHECK(now_ms() - begin < 900); /* it did not wait in vain */
    CHECK_IS(counter(w, "cancels"), 1);
}

static void the_host_dies_with_its_worker(void) {
    if (!fake_host_path)
        return;
    int alive[2];
    CHECK(pipe(alive) == 0);
    pid_t between = fork();
    if (between == 0) {
        struct fake_worker *w = worker_ready(filter);
        CHECK(write(alive[1], &w->pid, sizeof(w->pid)) == sizeof(w->pid));
        kill(getpid(), SIGKILL);
    }
    pid_t host;
    CHECK(read(alive[0], &host, sizeof(host)) == sizeof(host));
    waitpid(between, NULL, 0);
    for (int i = 0; i < 200 && kill(host, 0) == 0; i++)
        sleep_ms(10);
    char path[64], state = 0;
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)host);
    FILE *stat = fopen(path, "r");
    if (stat && fscanf(stat, "%*d %*s %c", &state) == 1)
        CHECK_IS(state, 'Z'); /* nobody may be there to wait for it */
    if (stat)
        fclose(stat);
}

static void signals_for_the_whole_group_do_not_end_the_host(void) {
    if (!fake_host_path)
        return;
    struct fake_worker *w = worker_ready(filter);
    kill(w->pid, SIGINT);
    kill(w->pid, SIGTERM);
    kill(w->pid, SIGHUP);
    check_verdict(verdict_of(w, T_PASS, UPCALL_WRITE), UPCALL_PASS, 0);
    end_well(w);
}

static void nothing_is_opened_by_path_once_the_filter_is_loaded(void) {
    if (!fake_host_path || getenv("UPCALL_TEST_SANITIZED"))
        return;
    setenv("UPCALL_TEST_NO_OPEN", "1", 1);
    struct fake_worker *w = worker_ready(filter);
    sleep_ms(20);
    check_verdict(verdict_of(w, T_SERVICES, UPCALL_WRITE), UPCALL_DONE, 0);
    check_verdict(after_hold(w, T_BLOCKING), UPCALL_WATCH, 0);
    check_verdict(after_hold(w, T_TIMER), UPCALL_DONE, 0);
    check_verdict(after_hold(w, T_OTHER_THREAD), UPCALL_PASS, 0);
    check_verdict(verdict_of(w, T_LOG_FLOOD, UPCALL_WRITE), UPCALL_PASS, 0);
    CHECK_IS(close_instance(w, 0), 0);
    CHECK_IS(worker_open(w, 1, "refuse"), -EACCES);
    worker_quit(w);
}

/* ---- waiting ---- */

static void a_sleeping_host_is_woken_by_its_doorbell_and_costs_nothing(void) {
    if (!fake_host_path)
        return;
    struct fake_worker *w = worker_ready(filter);
    CHECK_IS(close_instance(w, 0), 0); /* the test filter's own timer is not idle */
    clockid_t clock;
    struct timespec before, after;
    sleep_ms(50);
    CHECK(clock_getcpuclockid(w->pid, &clock) == 0);
    clock_gettime(clock, &before);
    sleep_ms(300);
    clock_gettime(clock, &after);
    int64_t used_us = (after.tv_sec - before.tv_sec) * INT64_C(1000000) +
                      (after.tv_nsec - before.tv_nsec) / 1000;
    CHECK(used_us < 5000);
    for (uint32_t i = 0; i < CHANNELS; i++)
        CHECK_IS(*(volatile uint32_t *)(w->channels[i].base + WIRE_SUBMISSION_SLEEPING_OFFSET), 1);
    for (int i = 0; i < 50; i++) {
        struct wire_completion out;
        submit(w, 1, start_of(T_PASS, UPCALL_WRITE));
        CHECK(reap(w, 1, 5000, &out));
        sleep_ms(2);
    }
    worker_quit(w);
}

static void a_worker_that_says_it_sleeps_is_rung_once_for_a_batch(void) {
    if (!fake_host_path)
        return;
    struct fake_worker *w = worker_ready(filter);
    struct fake_channel *c = &w->channels[0];
    volatile uint32_t *sleeping = (volatile uint32_t *)(c->base + WIRE_COMPLETION_SLEEPING_OFFSET);
    uint64_t rings;
    struct wire_completion out;
    int together = 0; /* rounds in which several were there at the bell: not all, on a busy machine */
    for (int round = 0; round < 10; round++) {
        __atomic_store_n(sleeping, 1, __ATOMIC_SEQ_CST);
        /* All of them while the first is being served: they are one batch. */
        submit(w, 0, start_of(T_SLOW, UPCALL_WRITE));
        for (int i = 0; i < 9; i++)
            submit(w, 0, start_of(i % 3 ? T_PASS : T_SLOW, UPCALL_WRITE));
        struct pollfd bell = { .fd = c->worker_bell, .events = POLLIN };
        CHECK_IS(poll(&bell, 1, 5000), 1);
        int there = 0;
        for (; there < 10 && reap(w, 0, 0, &out); there++) {}
        together += there > 1;
        for (; there < 10; there++)
            CHECK(reap(w, 0, 5000, &out));
        CHECK_IS(*sleeping, 0);
        CHECK(read(c->worker_bell, &rings, 8) == 8);
        CHECK_IS(rings, 1);
    }
    CHECK(together >= 5);
    verdict_of(w, T_PASS, UPCALL_WRITE);
    sleep_ms(5);
    CHECK(read(c->worker_bell, &rings, 8) < 0); /* awake: not rung */
    end_well(w);
}

static void a_hundred_thousand_requests_on_two_channels_all_come_back_once(void) {
    struct fake_worker *w = worker_ready(filter);
    enum { ALL = 100000, WINDOW = 32 };
    uint32_t sent[2] = { 0 }, back[2] = { 0 };
    const uint32_t all = getenv("UPCALL_TEST_SANITIZED") ? ALL / 10 : ALL;
    uint64_t end = now_ms() + 30000;
    while (back[0] < all || back[1] < all) {
        CHECK(now_ms() < end);
        for (uint32_t c = 0; c < 2; c++) {
            struct wire_submission start = start_of(T_PASS, UPCALL_WRITE);
            for (; sent[c] < all && sent[c] - back[c] < WINDOW; sent[c]++) {
                start.token = 1 + sent[c];
                submit(w, c, start);
            }
            struct wire_completion out;
            while (back[c] < sent[c] && reap(w, c, 0, &out)) {
                CHECK(out.token == ++back[c]); /* in order, as all are answered at once */
                check_verdict(out, UPCALL_PASS, 0);
            }
        }
    }
    CHECK_IS(counter(w, "requests"), 2 * all);
    end_well(w);
}

/* ---- messages that are wrong ---- */

static uint32_t open_descriptors(struct fake_worker *w) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd", w->host_path ? (int)w->pid : (int)getpid());
    DIR *dir = opendir(path);
    uint32_t count = 0;
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

static void wrong_messages_get_an_answer_and_leave_no_descriptor(void) {
    struct fake_worker *w = worker_start(filter);
    CHECK_IS(worker_say(w, WIRE_MSG_START, 0, 0, NULL, 0, NULL, 0), -EPROTO);
    CHECK_IS(worker_open(w, 0, "a"), -EPROTO);
    worker_prepare(w, 64, true);
    uint32_t before = open_descriptors(w);

    int fd = memfd_of(8192), many[40];
    for (int i = 0; i < 40; i++)
        many[i] = fd;
    before += !w->host_path; /* that one is ours, in the same process */
    struct wire_header header = { WIRE_MSG_LOAD, WIRE_VERSION + 1, 0, 0 };
    worker_send_raw(w, &header, 16, many, 1);
    CHECK(worker_hear(w) && w->result == -EPROTO && strstr(w->text, "wire version"));
    worker_send_raw(w, &header, 15, many, 2);
    CHECK(worker_hear(w) && w->result == -EBADMSG);
    CHECK_IS(worker_say(w, WIRE_MSG_LOAD, 0, 0, NULL, 0, many, 40), -EBADMSG);
    CHECK_IS(worker_say(w, WIRE_MSG_LOAD, 0, 0, NULL, 0, many, 32), -EINVAL);
    CHECK_IS(worker_say(w, 0, 0, 0, NULL, 0, NULL, 0), -EINVAL);
    CHECK_IS(worker_say(w, 11, 0, 0, NULL, 0, many, 3), -EINVAL);
    CHECK_IS(worker_say(w, WIRE_MSG_RESULT, 0, 0, NULL, 0, NULL, 0), -EINVAL);
    CHECK_IS(worker_say(w, WIRE_MSG_LOAD, 0, 0, NULL, 0, NULL, 0), -EALREADY);

    static unsigned char long_payload[WIRE_MESSAGE_MAX];
    CHECK_IS(worker_say(w, WIRE_MSG_OPEN, 0, 0, long_payload, WIRE_MESSAGE_MAX, many, 1), -EBADMSG);
    CHECK_IS(worker_say(w, WIRE_MSG_OPEN, 0, 0, long_payload, WIRE_MESSAGE_MAX - 16, many, 1),
             -EINVAL);

    struct wire_arena arena = { 8193, 0, 0 };
    CHECK_IS(worker_say(w, WIRE_MSG_ARENA, 3, 0, &arena, 16, many, 1), -EINVAL);
    arena.size = 0;
    CHECK_IS(worker_say(w, WIRE_MSG_ARENA, 3, 0, &arena, 16, many, 1), -EINVAL);
    arena.size = UINT64_MAX;
    CHECK(worker_say(w, WIRE_MSG_ARENA, 3, 0, &arena, 16, many, 1) < 0);
    arena.size = 8192;
    CHECK_IS(worker_say(w, WIRE_MSG_ARENA, 0, 0, &arena, 16, many, 1), -EEXIST);
    CHECK_IS(worker_say(w, WIRE_MSG_ARENA, UINT32_MAX, 0, &arena, 16, many, 1), -EEXIST);
    uint64_t size = 4096;
    CHECK_IS(worker_say(w, WIRE_MSG_ISSUE_ARENA, 0, 0, &size, 8, many, 1), -EEXIST);
    CHECK_IS(worker_say(w, WIRE_MSG_CHANNEL, 5, 0, NULL, 0, many, 3), -EINVAL); /* no ring */
    CHECK_IS(worker_say(w, WIRE_MSG_CHANNEL, 0, 0, NULL, 0, many, 3), -EEXIST);
    CHECK_IS(worker_say(w, WIRE_MSG_CHANNEL, UINT32_MAX, 0, NULL, 0, many, 3), -EEXIST);
    CHECK_IS(worker_say(w, WIRE_MSG_CLOSE, UINT32_MAX, 0, NULL, 0, NULL, 0), -ENOENT);
    CHECK_IS(open_descriptors(w), before);
    worker_quit(w);
}

static void a_channel_with_a_wrong_head_is_refused(void) {
    struct fake_worker *w = worker_start(filter);
    const uint32_t entries[] = { 0, 3, 8192, UINT32_MAX, 64 };
    for (size_t i = 0; i < 5; i++) {
        int fd = memfd_of(4096 + (i == 4 ? 64 : 128 * 8192)), fds[3] = { fd, fd, fd };
        uint32_t head[4] = { 0, 0, WIRE_VERSION, entries[i] };
        memcpy(head, "UPCLRING", 8);
        CHECK(pwrite(fd, head, 16, 0) == 16);
        CHECK_IS(worker_say(w, WIRE_MSG_CHANNEL, 0, 0, NULL, 0, fds, 3), -EINVAL);
        head[2] = WIRE_VERSION + 1;
        head[3] = 4;
        CHECK(pwrite(fd, head, 16, 0) == 16);
        CHECK_IS(worker_say(w, WIRE_MSG_CHANNEL, 0, 0, NULL, 0, fds, 3), -EINVAL);
        close(fd);
    }
    worker_quit(w);
}

static void every_beginning_of_an_open_is_refused_and_leaves_nothing(void) {
    struct fake_worker *w = worker_start(filter);
    worker_prepare(w, 64, true);
    unsigned char payload[1024];
    size_t length = worker_open_payload(payload, "a");
    int fds[3] = { memfd_of(4096), memfd_of(0), memfd_of(0) };
    uint32_t before = open_descriptors(w);
    for (size_t i = 0; i < length; i++)
        CHECK_IS(worker_say(w, WIRE_MSG_OPEN, 0, 0, payload, i, fds, 2), -EINVAL);
    payload[length] = 0;
    CHECK_IS(worker_say(w, WIRE_MSG_OPEN, 0, 0, payload, length + 1, fds, 2), -EINVAL);
    CHECK_IS(worker_say(w, WIRE_MSG_OPEN, 0, 0, payload, length, fds, 0), -EINVAL);
    CHECK_IS(worker_say(w, WIRE_MSG_OPEN, 0, 0, payload, length, fds, 1), -EINVAL);
    CHECK_IS(worker_say(w, WIRE_MSG_OPEN, 0, 0, payload, length, fds, 3), -EINVAL);
    CHECK(strstr(w->text, "belongs to no parameter"));
    for (size_t i = 0; i < length; i++) { /* every byte once wrong: an answer, whatever it is */
        payload[i] ^= 0xff;
        if (worker_say(w, WIRE_MSG_OPEN, 0, 0, payload, length, fds, 2) == 0)
            CHECK_IS(close_instance(w, 0), 0);
        payload[i] ^= 0xff;
    }
    CHECK_IS(open_descriptors(w), before);
    CHECK_IS(worker_say(w, WIRE_MSG_OPEN, 0, 0, payload, length, fds, 2), 0);
    CHECK_IS(close_instance(w, 0), 0);
    worker_quit(w);
}

static void random_messages_are_answered_one_by_one(void) {
    struct fake_worker *w = worker_start(filter);
    worker_prepare(w, 64, true);
    int fds[3] = { memfd_of(4096), memfd_of(4096), memfd_of(4096) };
    srandom(20261123);
    for (int i = 0; i < 3000; i++) {
        unsigned char bytes[256];
        for (size_t j = 0; j < sizeof(bytes); j++)
            bytes[j] = (unsigned char)(random() % 4 ? random() % 3 : random());
        struct wire_header header = { (uint32_t)random() % 12, WIRE_VERSION,
                                      (uint32_t)random() % 3, 0 };
        if (header.kind == WIRE_MSG_QUIT || header.kind == WIRE_MSG_LOAD)
            header.kind = WIRE_MSG_OPEN;
        memcpy(bytes, &header, 16);
        worker_send_raw(w, bytes, 16 + (size_t)random() % 240, fds, (uint32_t)random() % 4);
        CHECK(worker_hear(w));
    }
    worker_quit(w);
}

#define TEST(name) { #name, name }
static const struct { const char *name; void (*run)(void); } tests[] = {
    TEST(each_verdict_comes_back_as_the_filter_gave_it),
    TEST(a_watched_request_comes_back_with_its_context),
    TEST(on_the_way_up_the_filter_may_change_the_status_and_hold),
    TEST(a_verdict_that_is_none_reaches_the_worker_as_none),
    TEST(an_instance_that_is_not_open_gets_its_requests_failed),
    TEST(a_held_request_is_announced_before_another_thread_answers_it),
    TEST(a_watched_descriptor_calls_the_filter),
    TEST(an_answer_before_the_callback_returns_is_the_verdict),
    TEST(an_answer_and_a_verdict_are_one_verdict_and_a_line_in_the_log),
    TEST(a_second_answer_is_noticed_and_changes_nothing),
    TEST(an_answer_that_races_with_the_hold_is_never_lost_or_doubled),
    TEST(cancel_reaches_the_filter_with_the_context_of_the_held_request),
    TEST(the_filter_changes_data_in_the_arena),
    TEST(data_outside_the_arena_is_refused_and_no_data_is_null),
    TEST(writing_to_a_read_only_arena_faults_in_the_host_alone),
    TEST(an_issued_request_goes_down_and_its_end_comes_back),
    TEST(at_most_256_issued_requests_are_in_flight_and_each_ends_once),
    TEST(a_full_completion_ring_loses_nothing),
    TEST(the_services_keep_their_promises),
    TEST(counters_lose_no_count_between_threads),
    TEST(a_flood_of_log_lines_is_cut_and_the_cut_is_said),
    TEST(an_event_reaches_the_filter_and_may_be_refused),
    TEST(an_instance_that_refuses_to_open_says_why_and_may_try_again),
    TEST(an_instance_may_close_and_open_while_others_serve),
    TEST(close_waits_for_requests_issued_ones_and_blocking_work),
    TEST(when_the_worker_is_gone_everything_ends_in_order),
    TEST(the_host_dies_with_its_worker),
    TEST(signals_for_the_whole_group_do_not_end_the_host),
    TEST(nothing_is_opened_by_path_once_the_filter_is_loaded),
    TEST(a_sleeping_host_is_woken_by_its_doorbell_and_costs_nothing),
    TEST(a_worker_that_says_it_sleeps_is_rung_once_for_a_batch),
    TEST(a_hundred_thousand_requests_on_two_channels_all_come_back_once),
    TEST(wrong_messages_get_an_answer_and_leave_no_descriptor),
    TEST(a_channel_with_a_wrong_head_is_refused),
    TEST(every_beginning_of_an_open_is_refused_and_leaves_nothing),
    TEST(random_messages_are_answered_one_by_one),
};

static bool run(size_t index) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        tests[index].run();
        exit(0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    if (status)
        fprintf(stderr, "FAILED: %s (status %#x)\n", tests[index].name, (unsigned)status);
    return status == 0;
}

int main(int argc, char **argv) {
    CHECK(argc >= 2);
    filter = argv[1];
    fake_host_path = argc >= 3 && *argv[2] ? argv[2] : NULL;
    const char *only = argc >= 4 ? argv[3] : NULL;
    size_t count = sizeof(tests) / sizeof(*tests), passed = 0, ran = 0;
    for (size_t i = 0; i < count; i++)
        if (!only || strcmp(only, tests[i].name) == 0) {
            ran++;
            passed += run(i);
        }
    printf("%s, %zu bits: %zu of %zu tests passed\n", fake_host_path ? "isolated" : "inline",
           8 * sizeof(void *), passed, ran);
    return passed == ran && ran > 0 ? 0 : 1;
}
