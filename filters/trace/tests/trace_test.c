/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What the filter trace writes, checked on its table with services made up here: the timer
 * ticks when a test says so, and blocking work runs at once, later, or not at all.
 *
 *   trace_test FILE   writes FILE; run checks that every line of it is JSON
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <upcall/filter.h>

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);      \
            exit(1);                                                                     \
        }                                                                                \
    } while (0)

extern const struct upcall_filter upcall_filter;

/* ---- services ---- */

static int fd;
static int64_t buffer;
static char names[64][48];
static uint64_t values[64];
static char logged[1000];
static void (*tick)(void *);
static void *tick_arg;
static bool timer_stopped;
static enum { AT_ONCE, LATER, NEVER } work;
static void (*work_fn)(void *);
static void *work_arg;
static int works;

static int param_fd(struct upcall_instance *inst, const char *name) {
    (void)inst;
    return strcmp(name, "file") == 0 ? fd : -1;
}

static int64_t param_int(struct upcall_instance *inst, const char *name) {
    (void)inst;
    return strcmp(name, "buffer") == 0 ? buffer : 200;
}

static int32_t counter(struct upcall_instance *inst, const char *name) {
    (void)inst;
    for (int32_t i = 0; i < 64; i++) {
        if (!names[i][0])
            snprintf(names[i], 48, "%s", name);
        if (strcmp(names[i], name) == 0)
            return i;
    }
    return -1;
}

static void counter_add(struct upcall_instance *inst, int32_t counter, uint64_t delta) {
    (void)inst;
    CHECK(counter >= 0 && counter < 64);
    __atomic_fetch_add(&values[counter], delta, __ATOMIC_RELAXED);
}

static uint64_t value(const char *name) {
    return values[counter(NULL, name)];
}

static struct upcall_timer *timer_start(struct upcall_instance *inst, uint64_t delay_ms,
                                        uint64_t period_ms, void (*fn)(void *), void *arg) {
    (void)inst;
    CHECK(delay_ms == 200 && period_ms == 200);
    tick = fn;
    tick_arg = arg;
    return (struct upcall_timer *)&tick;
}

static void timer_stop(struct upcall_timer *timer) {
    CHECK(timer == (struct upcall_timer *)&tick);
    timer_stopped = true;
}

static int32_t run_blocking(struct upcall_instance *inst, void (*fn)(void *), void *arg) {
    (void)inst;
    works++;
    if (work == NEVER)
        return -ENOMEM;
    if (work == AT_ONCE) {
        fn(arg);
        return 0;
    }
    CHECK(!work_fn); /* one at a time */
    work_fn = fn;
    work_arg = arg;
    return 0;
}

static void log_(struct upcall_instance *inst, uint32_t level, const char *text) {
    (void)inst;
    (void)level;
    snprintf(logged, sizeof(logged), "%s", text);
}

static const struct upcall_services services = {
    .size = sizeof(services), .abi_version = UPCALL_ABI_VERSION, .param_fd = param_fd,
    .param_int = param_int, .counter = counter, .counter_add = counter_add,
    .timer_start = timer_start, .timer_stop = timer_stop, .run_blocking = run_blocking,
    .log = log_,
};

/* ---- help ---- */

static void *self;
static int all; /* FILE, which keeps every line of every test */

static void open_trace(int64_t size) {
    fd = memfd_create("trace", 0);
    buffer = size;
    work = AT_ONCE;
    work_fn = NULL;
    works = 0;
    timer_stopped = false;
    logged[0] = 0;
    memset(values, 0, sizeof(values));
    CHECK(upcall_filter.open(NULL, &self) == 0);
}

static const char *text(void) {
    static char text[1 << 20];
    ssize_t length = pread(fd, text, sizeof(text) - 1, 0);
    CHECK(length >= 0);
    text[length] = 0;
    return text;
}

static int lines(void) {
    int count = 0;
    for (const char *t = text(); *t; t++)
        count += *t == '\n';
    return count;
}

static void close_trace(void) {
    upcall_filter.close(self);
    CHECK(timer_stopped);
    CHECK(write(all, text(), strlen(text())) == (ssize_t)strlen(text()));
    close(fd);
}

static void request(uint8_t op, uint16_t flags, uint64_t offset, uint32_t length, int32_t status) {
    struct upcall_request req = { .size = sizeof(req), .op = op, .flags = flags, .offset = offset,
                                  .length = length };
    CHECK(upcall_filter.start_io(self, &req) == UPCALL_WATCH);
    req.status = status;
    CHECK(upcall_filter.io_done(self, &req) == UPCALL_PASS && req.status == status);
}

/* ---- tests ---- */

static void a_line_says_what_the_request_was_and_how_long_it_took(void) {
    open_trace(1 << 20);
    struct upcall_request slow = { .size = sizeof(slow), .op = UPCALL_READ, .offset = 1 << 20,
                                   .length = 8192 };
    CHECK(upcall_filter.start_io(self, &slow) == UPCALL_WATCH);
    request(UPCALL_WRITE, UPCALL_REQ_FUA, UINT64_C(1) << 40, 4096, -EIO);
    usleep(20000);
    CHECK(upcall_filter.io_done(self, &slow) == UPCALL_PASS);
    request(UPCALL_FLUSH, 0, 0, 0, 0);
    request(UPCALL_DISCARD, 0, 512, 0x7ffffe00, 0);
    request(UPCALL_WRITE_ZEROES, UPCALL_REQ_UNMAP, 0, 512, 0);
    CHECK(lines() == 0);
    tick(tick_arg);
    CHECK(lines() == 5);
    CHECK(strstr(text(), "{\"seq\":1,") == text()); /* it completed first */
    CHECK(strstr(text(), "\"op\":\"write\",\"offset\":1099511627776,\"length\":4096,\"status\":-5,"
                         "\"fua\":true,\"thread\":0}\n"));
    const char *line = strstr(text(), "{\"seq\":0,\"start_ns\":");
    CHECK(line);
    unsigned long long ns = strtoull(strstr(line, "\"ns\":") + 5, NULL, 10);
    CHECK(ns >= 20000000 && ns < 10000000000);
    CHECK(strstr(line, "\"op\":\"read\",\"offset\":1048576,\"length\":8192,\"status\":0,\"thread\":0}\n"));
    CHECK(strstr(text(), "\"op\":\"flush\",\"offset\":0,\"length\":0,\"status\":0,"));
    CHECK(strstr(text(), "\"op\":\"discard\",\"offset\":512,\"length\":2147483136,"));
    CHECK(strstr(text(), "\"op\":\"write_zeroes\",\"offset\":0,\"length\":512,\"status\":0,\"unmap\":true,"));
    CHECK(value("read") == 1 && value("write") == 1 && value("flush") == 1);
    CHECK(value("discard") == 1 && value("write_zeroes") == 1 && value("errors") == 1);
    CHECK(value("bytes_read") == 8192 && value("bytes_written") == 0);
    close_trace();
}

static void what_came_back_after_a_restart_has_no_time(void) {
    open_trace(1 << 20);
    struct upcall_request req = { .size = sizeof(req), .op = UPCALL_READ, .length = 512,
                                  .flags = UPCALL_REQ_RETRY };
    CHECK(upcall_filter.io_done(self, &req) == UPCALL_PASS);
    tick(tick_arg);
    CHECK(strstr(text(), "{\"seq\":null,\"start_ns\":null,\"ns\":null,"));
    CHECK(strstr(text(), "\"retry\":true"));
    close_trace();
}

static void an_idle_disk_causes_no_work(void) {
    open_trace(1 << 20);
    tick(tick_arg);
    tick(tick_arg);
    CHECK(works == 0);
    close_trace();
}

static void close_writes_the_rest(void) {
    open_trace(1 << 20);
    work = NEVER;
    request(UPCALL_READ, 0, 0, 512, 0);
    tick(tick_arg);
    tick(tick_arg); /* a failed start is tried again */
    CHECK(works == 2 && lines() == 0);
    upcall_filter.close(self);
    CHECK(lines() == 1);
    close(fd);
}

static void a_half_full_buffer_is_written_at_once(void) {
    open_trace(8192);
    for (int i = 0; i < 100; i++)
        request(UPCALL_READ, 0, 0, 512, 0);
    CHECK(works > 1 && lines() > 50);
    CHECK(value("lines_dropped") == 0);
    close_trace();
}

static void lines_that_do_not_fit_are_dropped_counted_and_said(void) {
    open_trace(8192);
    work = LATER; /* a slow file: the first job does not get to run */
    for (int i = 0; i < 200; i++)
        request(UPCALL_READ, 0, 0, 512, 0);
    uint64_t dropped = value("lines_dropped");
    CHECK(works == 1 && dropped > 100 && dropped < 200);
    CHECK(value("read") == 200);
    work = AT_ONCE;
    work_fn(work_arg);
    CHECK(lines() == 200 - (int)dropped + 1);
    char line[100];
    snprintf(line, sizeof(line), "\n{\"dropped\":%d}\n", (int)dropped);
    CHECK(strstr(text(), line));
    CHECK(strstr(logged, "lines dropped"));
    request(UPCALL_READ, 0, 0, 512, 0);
    tick(tick_arg);
    CHECK(value("lines_dropped") == dropped);
    CHECK(lines() == 200 - (int)dropped + 2);
    close_trace();
}

static void a_drop_is_said_however_full_the_buffer_is(void) {
    for (int64_t size = 8192; size < 8192 + 300; size += 2) {
        open_trace(size);
        work = LATER;
        for (int i = 0; i < 100; i++)
            request(UPCALL_READ, 0, 0, 512, 0);
        work_fn(work_arg); /* a sanitizer sees it if there was no room */
        CHECK(strstr(text(), "\n{\"dropped\":"));
        close_trace();
    }
}

static void a_file_that_cannot_be_written_costs_lines_and_no_request(void) {
    open_trace(1 << 20);
    int good = fd, full = open("/dev/full", O_WRONLY);
    CHECK(full >= 0 && dup2(full, good) == good);
    request(UPCALL_READ, 0, 0, 512, 0);
    request(UPCALL_READ, 0, 0, 512, 0);
    tick(tick_arg);
    CHECK(strstr(logged, "No space left"));
    CHECK(value("lines_dropped") == 2 && value("read") == 2);
    upcall_filter.close(self);
    close(full);
    close(good);
}

static void without_a_file_it_only_counts(void) {
    fd = -1;
    tick = NULL;
    memset(values, 0, sizeof(values));
    CHECK(upcall_filter.open(NULL, &self) == 0 && !tick);
    request(UPCALL_WRITE, 0, 0, 512, 0);
    CHECK(value("write") == 1 && value("bytes_written") == 512);
    upcall_filter.close(self);
}

static void *many(void *arg) {
    (void)arg;
    for (int i = 0; i < 2000; i++)
        request(UPCALL_WRITE, 0, (uint64_t)i * 512, 512, 0);
    return NULL;
}

static void queue_threads_do_not_mix_their_lines(void) {
    open_trace(4 << 20);
    work = NEVER;
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, many, NULL) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    work = AT_ONCE;
    tick(tick_arg);
    CHECK(lines() == 8000 && value("write") == 8000);
    for (int i = 1; i <= 4; i++) {
        char thread[32];
        snprintf(thread, sizeof(thread), "\"thread\":%d}", i);
        CHECK(strstr(text(), thread));
    }
    close_trace();
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    all = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0600);
    CHECK(all >= 0 && upcall_filter.load(&services) == 0);
    a_line_says_what_the_request_was_and_how_long_it_took();
    what_came_back_after_a_restart_has_no_time();
    an_idle_disk_causes_no_work();
    close_writes_the_rest();
    a_half_full_buffer_is_written_at_once();
    lines_that_do_not_fit_are_dropped_counted_and_said();
    a_drop_is_said_however_full_the_buffer_is();
    a_file_that_cannot_be_written_costs_lines_and_no_request();
    without_a_file_it_only_counts();
    queue_threads_do_not_mix_their_lines();
    return 0;
}
