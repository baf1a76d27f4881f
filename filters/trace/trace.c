/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * trace: one JSON line for each request and its timing. See upcall-trace.7.
 *
 * An observer: it asks for no data, changes nothing, and never lets a request wait for its
 * file. Lines go into a buffer of fixed size; blocking work writes it out. A line that
 * finds the buffer full is dropped, counted, and the drop is written down.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <upcall/filter.h>

#define LINE_MAX_BYTES 256

static const struct upcall_services *up;

/* Names in lines and of counters, by operation. */
static const char *const op_names[] = { NULL, "read", "write", "flush", "discard", "write_zeroes" };
#define OPS_COUNT (sizeof(op_names) / sizeof(*op_names))

struct lines {
    char *bytes;
    size_t used;
};

struct trace {
    struct upcall_instance *inst;
    int fd; /* -1: counters only */
    struct upcall_timer *timer;
    uint64_t opened_ns;
    UPCALL_ALIGN8 uint64_t next_seq; /* by __atomic_fetch_add */

    pthread_mutex_t lock;
    struct lines filling, writing; /* `writing` belongs to whoever set `is_writing` */
    size_t room;                   /* of each, bytes */
    uint64_t dropped;              /* lines, since it was last written down */
    bool is_writing;

    int32_t ops[OPS_COUNT], errors, bytes_read, bytes_written, lines_dropped; /* counters */
};

/* What is kept of a request while it is below. */
struct seen {
    uint64_t seq;
    uint64_t start_ns;
};

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A small number for the calling thread: the queue threads are 0, 1, ... as they come. */
static unsigned thread_number(void) {
    static _Atomic unsigned next;
    static _Thread_local unsigned mine; /* + 1 */
    if (mine == 0)
        mine = atomic_fetch_add(&next, 1) + 1;
    return mine - 1;
}

/* ---- writing ---- */

static uint64_t count_lines(const char *bytes, size_t length) {
    uint64_t count = 0;
    for (size_t i = 0; i < length; i++)
        count += bytes[i] == '\n';
    return count;
}

/* Writes it all; 0, or the errno that stopped it, with *done bytes written. */
static int write_all(int fd, const char *bytes, size_t length, size_t *done) {
    for (*done = 0; *done < length;) {
        ssize_t written = write(fd, bytes + *done, length - *done);
        if (written > 0)
            *done += (size_t)written;
        else if (written == 0 || errno != EINTR)
            return written == 0 ? EIO : errno;
    }
    return 0;
}

static void drop(struct trace *t, uint64_t lines) {
    up->counter_add(t->inst, t->lines_dropped, lines);
    pthread_mutex_lock(&t->lock);
    t->dropped += lines;
    pthread_mutex_unlock(&t->lock);
}

/* Takes what has been filled. The caller has set `is_writing`; returns the lines dropped before. */
static uint64_t swap(struct trace *t) {
    pthread_mutex_lock(&t->lock);
    struct lines full = t->filling;
    t->filling = t->writing;
    t->filling.used = 0;
    t->writing = full;
    uint64_t dropped = t->dropped;
    t->dropped = 0;
    pthread_mutex_unlock(&t->lock);
    return dropped;
}

static void write_out(struct trace *t) {
    uint64_t dropped = swap(t);
    struct lines *lines = &t->writing;
    if (dropped) { /* there is room: append() leaves that much */
        lines->used += (size_t)snprintf(lines->bytes + lines->used, LINE_MAX_BYTES,
                                        "{\"dropped\":%" PRIu64 "}\n", dropped);
        char text[100];
        snprintf(text, sizeof(text), "%" PRIu64 " lines dropped: the file is too slow, or the "
                 "buffer too small", dropped);
        up->log(t->inst, UPCALL_LOG_WARN, text);
    }
    size_t done;
    int error = write_all(t->fd, lines->bytes, lines->used, &done);
    if (error) {
        char text[100];
        snprintf(text, sizeof(text), "cannot write the trace: %s", strerror(error));
        up->log(t->inst, UPCALL_LOG_ERROR, text);
        drop(t, count_lines(lines->bytes + done, lines->used - done));
    }
    lines->used = 0;
}

static void write_job(void *arg) {
    struct trace *t = arg;
    write_out(t);
    pthread_mutex_lock(&t->lock);
    t->is_writing = false;
    pthread_mutex_unlock(&t->lock);
}

/* With the lock; whether the caller is to start a job. */
static bool wants_writing(struct trace *t) {
    bool wanted = !t->is_writing && (t->filling.used || t->dropped);
    if (wanted)
        t->is_writing = true;
    return wanted;
}

static void start_job(struct trace *t) {
    if (up->run_blocking(t->inst, write_job, t) == 0)
        return;
    pthread_mutex_lock(&t->lock);
    t->is_writing = false; /* the next tick tries again; close() writes the rest */
    pthread_mutex_unlock(&t->lock);
}

static void tick(void *arg) {
    struct trace *t = arg;
    pthread_mutex_lock(&t->lock);
    bool wanted = wants_writing(t);
    pthread_mutex_unlock(&t->lock);
    if (wanted)
        start_job(t);
}

/* ---- lines ---- */

static void append(struct trace *t, const char *line, size_t length) {
    pthread_mutex_lock(&t->lock);
    bool fits = t->filling.used + length + LINE_MAX_BYTES <= t->room;
    if (fits) {
        memcpy(t->filling.bytes + t->filling.used, line, length);
        t->filling.used += length;
    } else {
        t->dropped++;
    }
    bool wanted = t->filling.used > t->room / 2 && wants_writing(t);
    pthread_mutex_unlock(&t->lock);
    if (!fits)
        up->counter_add(t->inst, t->lines_dropped, 1);
    if (wanted)
        start_job(t);
}

static const char *name_of(const struct upcall_request *req) {
    return req->op < OPS_COUNT && op_names[req->op] ? op_names[req->op] : "unknown";
}

/* @seen is NULL for a request that an instance before this one saw start. */
static void write_line(struct trace *t, const struct upcall_request *req, const struct seen *seen,
                       uint64_t now) {
    char line[LINE_MAX_BYTES], start[96] = "\"seq\":null,\"start_ns\":null,\"ns\":null";
    if (seen)
        snprintf(start, sizeof(start),
                 "\"seq\":%" PRIu64 ",\"start_ns\":%" PRIu64 ",\"ns\":%" PRIu64, seen->seq,
                 seen->start_ns - t->opened_ns, now - seen->start_ns);
    int length = snprintf(
        line, sizeof(line),
        "{%s,\"op\":\"%s\",\"offset\":%" PRIu64 ",\"length\":%" PRIu32 ",\"status\":%" PRId32
        "%s%s%s,\"thread\":%u}\n",
        start, name_of(req), req->offset, req->length, req->status,
        req->flags & UPCALL_REQ_FUA ? ",\"fua\":true" : "",
        req->flags & UPCALL_REQ_UNMAP ? ",\"unmap\":true" : "",
        req->flags & UPCALL_REQ_RETRY ? ",\"retry\":true" : "", thread_number());
    append(t, line, (size_t)length);
}

/* ---- requests ---- */

static uint32_t trace_start_io(void *self, struct upcall_request *req) {
    struct trace *t = self;
    struct seen *seen = t->fd >= 0 ? malloc(sizeof(*seen)) : NULL;
    if (seen) {
        seen->seq = __atomic_fetch_add(&t->next_seq, 1, __ATOMIC_RELAXED);
        seen->start_ns = now_ns();
    }
    req->context = seen;
    return UPCALL_WATCH;
}

static uint32_t trace_io_done(void *self, struct upcall_request *req) {
    struct trace *t = self;
    struct seen *seen = req->context;
    if (req->op < OPS_COUNT)
        up->counter_add(t->inst, t->ops[req->op], 1);
    if (req->status != 0)
        up->counter_add(t->inst, t->errors, 1);
    else if (req->op == UPCALL_READ)
        up->counter_add(t->inst, t->bytes_read, req->length);
    else if (req->op == UPCALL_WRITE)
        up->counter_add(t->inst, t->bytes_written, req->length);
    if (t->fd >= 0)
        write_line(t, req, seen, now_ns());
    free(seen);
    return UPCALL_PASS;
}

/* ---- life ---- */

static void name_counters(struct trace *t) {
    t->ops[0] = -1;
    for (size_t op = 1; op < OPS_COUNT; op++)
        t->ops[op] = up->counter(t->inst, op_names[op]);
    t->errors = up->counter(t->inst, "errors");
    t->bytes_read = up->counter(t->inst, "bytes_read");
    t->bytes_written = up->counter(t->inst, "bytes_written");
    t->lines_dropped = up->counter(t->inst, "lines_dropped");
}

static void free_trace(struct trace *t) {
    pthread_mutex_destroy(&t->lock);
    free(t->filling.bytes);
    free(t->writing.bytes);
    free(t);
}

static int32_t trace_open(struct upcall_instance *inst, void **self) {
    struct trace *t = calloc(1, sizeof(*t));
    if (!t)
        return -ENOMEM;
    t->inst = inst;
    t->fd = up->param_fd(inst, "file");
    t->opened_ns = now_ns();
    t->room = (size_t)up->param_int(inst, "buffer") / 2;
    pthread_mutex_init(&t->lock, NULL);
    name_counters(t);
    *self = t;
    if (t->fd < 0)
        return 0;
    uint64_t period = (uint64_t)up->param_int(inst, "interval");
    t->filling.bytes = malloc(t->room);
    t->writing.bytes = malloc(t->room);
    if (t->filling.bytes && t->writing.bytes)
        t->timer = up->timer_start(inst, period, period, tick, t);
    if (t->timer)
        return 0;
    free_trace(t);
    return -ENOMEM;
}

/* No request and no blocking work is left; the timer is stopped first, so nobody else is here. */
static void trace_close(void *self) {
    struct trace *t = self;
    if (t->fd >= 0) {
        up->timer_stop(t->timer);
        write_out(t);
    }
    free_trace(t);
}

static int32_t trace_load(const struct upcall_services *services) {
    up = services;
    return 0;
}

static const struct upcall_param params[] = {
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_FILE_APPEND, .name = "file",
      .doc = "Where the lines go; without it, only counters are kept." },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_SIZE, .name = "buffer",
      .doc = "Memory for lines that are not yet written; beyond it they are dropped.",
      .default_value = "4M", .min = 4096, .max = 256 << 20 },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_MILLIS, .name = "interval",
      .doc = "How long a line may wait before it is written.",
      .default_value = "200ms", .min = 1, .max = 60000 },
};

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "trace",
    .version = "0.1.0",
    .vendor = "Upcall",
    .summary = "Writes each request and its timing as a line of JSON",
    .filter_class = UPCALL_CLASS_CAPTURE,
    .ops = UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE) | UPCALL_OP_BIT(UPCALL_FLUSH) |
           UPCALL_OP_BIT(UPCALL_DISCARD) | UPCALL_OP_BIT(UPCALL_WRITE_ZEROES),
    .param_count = sizeof(params) / sizeof(*params),
    .params = params,
    .load = trace_load,
    .open = trace_open,
    .close = trace_close,
    .start_io = trace_start_io,
    .io_done = trace_io_done,
};
