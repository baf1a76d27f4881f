/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The filter of the filter host's tests. What it does with a request is said by the
 * request's offset: block N (of 4096 bytes) is behaviour N of testfilter.h.
 *
 * With UPCALL_TEST_NO_OPEN in the environment, load() forbids the whole process to open
 * files from then on: whoever tries is killed by the kernel.
 */
#define _GNU_SOURCE
#include "testfilter.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <upcall/filter.h>

static const struct upcall_services *up;

struct self {
    struct upcall_instance *inst;
    int32_t requests, cancels; /* counters */
    struct upcall_watch *watch;
    struct upcall_timer *ticks;
    int pipe[2];
    _Atomic int tick_count;
    struct upcall_request *_Atomic by_watch;
    _Atomic int issued_back;
    struct upcall_request *kept[16]; /* by one queue only */
    uint32_t kept_count;
};

/* A request and the self it came to, for threads. */
struct held {
    struct self *self;
    struct upcall_request *req;
    struct upcall_timer *_Atomic timer;
    _Atomic bool handed_over;
    void *buffer;
};

static struct held *keep(struct self *self, struct upcall_request *req) {
    struct held *held = calloc(1, sizeof(*held));
    held->self = self;
    held->req = req;
    req->context = held;
    return held;
}

static void *answer_pass(void *arg) {
    struct held *held = arg;
    up->answer(held->req, UPCALL_PASS, 0);
    free(held);
    return NULL;
}

static void *answer_pass_soon(void *arg) {
    /* After the callback has returned, on a busy machine too: HELD is expected before. */
    usleep(20000);
    return answer_pass(arg);
}

/* Threads of our own; unload() waits for them, as it must. */
static pthread_t threads[4096];
static _Atomic uint32_t thread_count;

static void on_thread(void *(*fn)(void *), void *arg) {
    uint32_t at = atomic_fetch_add(&thread_count, 1);
    if (at >= sizeof(threads) / sizeof(*threads) || pthread_create(&threads[at], NULL, fn, arg) != 0)
        abort();
}

static void answer_twice(void *arg) {
    struct held *held = arg;
    usleep(2000);
    up->answer(held->req, UPCALL_PASS, 0);
    up->answer(held->req, UPCALL_PASS, 0);
    free(held);
}

static void answer_watch(void *arg) {
    struct held *held = arg;
    usleep(2000);
    struct upcall_request *req = held->req;
    /* The ring orders this before io_done(); ThreadSanitizer does not see through memfds. */
    atomic_store(&held->handed_over, true);
    up->answer(req, UPCALL_WATCH, 0); /* its context goes along: freed in io_done */
}

static void by_timer(void *arg) {
    struct held *held = arg;
    up->timer_stop(held->timer); /* from within itself */
    up->answer(held->req, UPCALL_DONE, 0);
    free(held);
}

static void by_watch(void *arg, uint32_t revents) {
    struct self *self = arg;
    char byte;
    (void)revents;
    if (read(self->pipe[0], &byte, 1) == 1)
        up->answer(atomic_load(&self->by_watch), UPCALL_PASS, 0);
}

static void tick(void *arg) {
    struct self *self = arg;
    atomic_fetch_add(&self->tick_count, 1);
}

static void issue_done(void *arg, int32_t status) {
    struct held *held = arg;
    bool right = status == 0 && memcmp(held->buffer, "below", 5) == 0;
    up->buffer_free(held->self->inst, held->buffer);
    up->answer(held->req, right ? UPCALL_DONE : UPCALL_FAIL, status ? status : -EILSEQ);
    free(held);
}

static uint32_t issue_read(struct self *self, struct upcall_request *req) {
    struct held *held = keep(self, req);
    held->buffer = up->buffer_alloc(self->inst, req->length);
    struct upcall_issue io = { .size = sizeof(io), .op = UPCALL_READ, .offset = 65536,
                               .length = req->length, .data = held->buffer, .done = issue_done,
                               .arg = held };
    req->status = up->issue(self->inst, &io);
    return req->status ? UPCALL_FAIL : UPCALL_HOLD;
}

static void count_back(void *arg, int32_t status) {
    struct self *self = arg;
    (void)status;
    atomic_fetch_add(&self->issued_back, 1);
}

/* Issues flushes until no more go; says in the status how many went. */
static uint32_t issue_flood(struct self *self, struct upcall_request *req) {
    struct upcall_issue io = { .size = sizeof(io), .op = UPCALL_FLUSH, .done = count_back,
                               .arg = self };
    int32_t went = 0, error;
    while ((error = up->issue(self->inst, &io)) == 0 && went < 1000)
        went++;
    req->status = error == -EAGAIN ? -went : -1;
    return UPCALL_FAIL;
}

#define WRONG() (req->status = -__LINE__, (uint32_t)UPCALL_FAIL)

/* Each service's promises that need no worker. FAIL with the line of the one not kept. */
static uint32_t check_services(struct self *self, struct upcall_request *req) {
    struct upcall_instance *inst = self->inst;
    if (up->size != sizeof(*up) || up->abi_version != UPCALL_ABI_VERSION) return WRONG();
    if (up->param_int(inst, "number") != -42) return WRONG();
    if (up->param_int(inst, "size") != 3 << 20) return WRONG();
    if (up->param_int(inst, "time") != 1500) return WRONG();
    if (up->param_int(inst, "flag") != 1) return WRONG();
    if (strcmp(up->param_string(inst, "text"), "a b\xc3\xa9") != 0) return WRONG();
    if (up->param_string(inst, "nothing") != NULL) return WRONG();
    if (up->param_fd(inst, "file") < 0 || write(up->param_fd(inst, "file"), "line\n", 5) != 5)
        return WRONG();
    if (up->param_fd(inst, "absent") != -1) return WRONG();

    const struct upcall_disk *disk = up->disk(inst, 0);
    if (!disk || disk->capacity != 1 << 20 || disk->block_size != 512 || disk->read_only)
        return WRONG();
    if (!up->disk(inst, 1) || up->disk(inst, 1)->block_size != 4096) return WRONG();
    if (up->disk(inst, 2)) return WRONG();

    if (up->counter(inst, "requests") != self->requests) return WRONG();
    if (up->counter(inst, "a name that is much longer than a counter's may be") != -1)
        return WRONG();
    if (up->counter(inst, "") != -1) return WRONG();

    char *a = up->buffer_alloc(inst, 5000), *b = up->buffer_alloc(inst, 4 << 20);
    if (!a || !b || (uintptr_t)a % 4096 || (uintptr_t)b % 4096) return WRONG();
    if (up->buffer_alloc(inst, (4 << 20) + 1) || up->buffer_alloc(inst, 0)) return WRONG();
    memset(a, 1, 5000), memset(b, 2, 4 << 20);
    if (a[4999] != 1) return WRONG();

    struct upcall_issue good = { .size = sizeof(good), .op = UPCALL_WRITE, .length = 4096,
                                 .data = a, .done = count_back, .arg = self };
#define REFUSED(error, ...) do {                                              \
        struct upcall_issue io = good;                                        \
        __VA_ARGS__;                                                          \
        if (up->issue(inst, &io) != (error)) return WRONG();                  \
    } while (0)
    REFUSED(-EINVAL, io.size = 8);
    REFUSED(-EINVAL, io.op = 0);
    REFUSED(-EINVAL, io.op = 6);
    REFUSED(-EINVAL, io.flags = UPCALL_REQ_RETRY);
    REFUSED(-EINVAL, io.op = UPCALL_READ; io.flags = UPCALL_REQ_FUA);
    REFUSED(-EINVAL, io.offset = 100);
    REFUSED(-EINVAL, io.length = 100);
    REFUSED(-EINVAL, io.length = 0);
    REFUSED(-EINVAL, io.offset = 1 << 20);
    REFUSED(-EINVAL, io.offset = UINT64_MAX - 511);
    REFUSED(-EINVAL, io.data = NULL);
    REFUSED(-EINVAL, io.data = self);
    REFUSED(-EINVAL, io.length = 16384; io.data = a + 4096 * 4000);
    REFUSED(-EINVAL, io.done = NULL);
    REFUSED(-EINVAL, io.op = UPCALL_DISCARD);
    REFUSED(-EINVAL, io.op = UPCALL_FLUSH; io.data = NULL);
    REFUSED(-ENODEV, io.disk = 2);
    REFUSED(-EINVAL, io.disk = 1; io.length = 512);
    up->buffer_free(inst, b);
    REFUSED(-EINVAL, io.data = b);
    up->buffer_free(inst, a);
    REFUSED(-EINVAL, (void)0);
    up->buffer_free(inst, NULL);

    if (atomic_load(&self->tick_count) == 0) return WRONG();
    return UPCALL_DONE;
}

static void *feed(void *arg) {
    struct held *held = arg;
    for (int i = 0; i < 20000; i++)
        up->counter_add(held->self->inst, held->self->requests, 1);
    return answer_pass(held);
}

static void work_soon(void *arg) {
    struct self *self = arg;
    usleep(50000);
    up->counter_add(self->inst, up->counter(self->inst, "worked"), 1);
}

static uint32_t start_io(void *arg, struct upcall_request *req) {
    struct self *self = arg;
    up->counter_add(self->inst, self->requests, 1);
    if (req->size != sizeof(*req) || req->context)
        return WRONG();
    switch (req->offset / 4096) {
    case T_PASS: return UPCALL_PASS;
    case T_WATCH:
        req->context = (void *)(uintptr_t)(0x1000 + req->length);
        return UPCALL_WATCH;
    case T_DONE: return UPCALL_DONE;
    case T_FAIL: req->status = -ENOSPC; return UPCALL_FAIL;
    case T_HOLD_UNTIL_CANCEL: keep(self, req); return UPCALL_HOLD;
    case T_OTHER_THREAD: on_thread(answer_pass_soon, keep(self, req)); return UPCALL_HOLD;
    case T_RACING_THREAD: on_thread(answer_pass, keep(self, req)); return UPCALL_HOLD;
    case T_EARLY: up->answer(req, UPCALL_FAIL, -ENOTEMPTY); return UPCALL_HOLD;
    case T_EARLY_THREAD: {
        pthread_t thread;
        pthread_create(&thread, NULL, answer_pass, keep(self, req));
        pthread_join(thread, NULL);
        return UPCALL_HOLD;
    }
    case T_EARLY_AND_PASS: up->answer(req, UPCALL_FAIL, -ENOTEMPTY); return UPCALL_PASS;
    case T_TWICE: up->run_blocking(self->inst, answer_twice, keep(self, req)); return UPCALL_HOLD;
    case T_ISSUE: return issue_read(self, req);
    case T_FLOOD: return issue_flood(self, req);
    case T_FLOOD_BACK: req->status = -atomic_load(&self->issued_back); return UPCALL_FAIL;
    case T_TIMER: {
        struct held *held = keep(self, req);
        held->timer = up->timer_start(self->inst, 20, 5, by_timer, held);
        return held->timer ? UPCALL_HOLD : UPCALL_FAIL;
    }
    case T_FD_WATCH:
        atomic_store(&self->by_watch, req);
        return write(self->pipe[1], "x", 1) == 1 ? UPCALL_HOLD : UPCALL_FAIL;
    case T_BLOCKING:
        return up->run_blocking(self->inst, answer_watch, keep(self, req)) ? UPCALL_FAIL
                                                                           : UPCALL_HOLD;
    case T_INVERT:
        for (uint32_t i = 0; req->data && i < req->length; i++)
            ((unsigned char *)req->data)[i] ^= 0xff;
        return req->data ? UPCALL_PASS : UPCALL_FAIL;
    case T_NONSENSE: return 256;
    case T_DONE_HOLD: case T_DONE_STATUS: case T_DONE_FAIL: return UPCALL_WATCH;
    case T_SERVICES: return check_services(self, req);
    case T_LOG_FLOOD:
        for (int i = 0; i < 500; i++)
            up->log(self->inst, UPCALL_LOG_INFO, "flood");
        return UPCALL_PASS;
    case T_SEES: /* FAIL with the first byte, or -ENODATA */
        req->status = req->data ? -*(unsigned char *)req->data : -ENODATA;
        return UPCALL_FAIL;
    case T_FEED: on_thread(feed, keep(self, req)); return UPCALL_HOLD;
    case T_KEEP: self->kept[self->kept_count++] = req; return UPCALL_HOLD;
    case T_RELEASE:
        while (self->kept_count)
            up->answer(self->kept[--self->kept_count], UPCALL_DONE, 0);
        return UPCALL_PASS;
    case T_ISSUE_ONE: {
        struct upcall_issue io = { .size = sizeof(io), .op = UPCALL_FLUSH, .done = count_back,
                                   .arg = self };
        req->status = up->issue(self->inst, &io);
        return req->status ? UPCALL_FAIL : UPCALL_PASS;
    }
    case T_SLOW: usleep(1000); return UPCALL_PASS;
    case T_WORK: up->run_blocking(self->inst, work_soon, self); return UPCALL_PASS;
    default: return WRONG();
    }
}

static uint32_t io_done(void *arg, struct upcall_request *req) {
    struct self *self = arg;
    switch (req->offset / 4096) {
    case T_WATCH:
        if (req->context != (void *)(uintptr_t)(0x1000 + req->length))
            return WRONG();
        return UPCALL_PASS;
    case T_BLOCKING:
        if (!atomic_load(&((struct held *)req->context)->handed_over))
            return WRONG();
        free(req->context);
        return UPCALL_DONE;
    case T_DONE_HOLD: on_thread(answer_pass_soon, keep(self, req)); return UPCALL_HOLD;
    case T_DONE_STATUS: req->status = -EDOM; return UPCALL_PASS;
    case T_DONE_FAIL: req->status = -EXDEV; return UPCALL_FAIL;
    default: return WRONG();
    }
}

static void cancel(void *arg, void *context) {
    struct self *self = arg;
    struct held *held = context;
    up->counter_add(self->inst, self->cancels, 1);
    up->answer(held->req, UPCALL_FAIL, -ECANCELED);
    free(held);
}

static int32_t event(void *arg, uint32_t event) {
    (void)arg;
    return event == UPCALL_EVENT_STUN ? 0 : -EBUSY;
}

static int32_t open_(struct upcall_instance *inst, void **self_out) {
    struct self *self = calloc(1, sizeof(*self));
    if (strcmp(up->param_string(inst, "text"), "refuse") == 0) {
        up->log(inst, UPCALL_LOG_ERROR, "refused as told");
        free(self);
        return -EACCES;
    }
    self->inst = inst;
    self->requests = up->counter(inst, "requests");
    self->cancels = up->counter(inst, "cancels");
    if (pipe(self->pipe) != 0)
        return -EMFILE;
    self->watch = up->watch_start(inst, self->pipe[0], 1 /* POLLIN */, by_watch, self);
    self->ticks = up->timer_start(inst, 1, 1, tick, self);
    *self_out = self;
    return 0;
}

static void close_(void *arg) {
    struct self *self = arg;
    up->watch_stop(self->watch);
    up->timer_stop(self->ticks);
    int ticks = atomic_load(&self->tick_count);
    usleep(5000);
    up->log(self->inst, UPCALL_LOG_INFO,
            ticks == atomic_load(&self->tick_count) ? "closed" : "a stopped timer ran");
    close(self->pipe[0]);
    close(self->pipe[1]);
    free(self);
}

static void forbid_open(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_open, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_openat, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof(code) / sizeof(*code), code };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        abort();
}

static int32_t load(const struct upcall_services *services) {
    up = services;
    if (getenv("UPCALL_TEST_NO_OPEN"))
        forbid_open();
    up->log(NULL, UPCALL_LOG_INFO, "loaded");
    return 0;
}

static void unload(void) {
    for (uint32_t i = 0; i < thread_count; i++)
        pthread_join(threads[i], NULL);
    up->log(NULL, UPCALL_LOG_INFO, "unloaded");
}

#define OPS (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE) | UPCALL_OP_BIT(UPCALL_FLUSH))
#define DATA (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE))

static const struct upcall_param params[] = {
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_INT, .name = "number",
      .doc = "A number.", .default_value = "7", .min = -100, .max = 100 },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_SIZE, .name = "size",
      .doc = "A size.", .default_value = "1M", .max = 1 << 30 },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_MILLIS, .name = "time",
      .doc = "A time.", .default_value = "1s", .max = 10000 },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_BOOL, .name = "flag",
      .doc = "A flag.", .default_value = "no" },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_STRING, .name = "text",
      .doc = "A \"text\".", .default_value = "", .max = 100 },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_FILE_APPEND, .name = "file",
      .doc = "A file." },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_FILE_READ, .name = "absent",
      .doc = "Another file." },
};

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "testfilter",
    .version = "1.0",
    .vendor = "Upcall",
    .summary = "Does what the offset says",
    .filter_class = UPCALL_CLASS_INSPECTION,
    .flags = UPCALL_FILTER_ISSUES,
    .ops = OPS,
    .sees = DATA,
    .changes = DATA,
    .answers = OPS,
    .param_count = sizeof(params) / sizeof(*params),
    .params = params,
    .load = load,
    .unload = unload,
    .open = open_,
    .close = close_,
    .start_io = start_io,
    .io_done = io_done,
    .cancel = cancel,
    .event = event,
};
