/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The benchmark's filter: as little as a filter can do, so that what is measured is the way
 * to it and back. What it declares is set by the compiler (-DSEES=..., and so on); the
 * parameter `mode` says what it answers:
 *
 *     pass      at once
 *     watch     pass, and see the completion
 *     hold      later, from a thread of its own that polls for what is held while there is work
 *     blocking  later, from one of the framework's threads, which sleep
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <upcall/filter.h>

#define RW (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE))
#ifndef NAME
#define NAME "bench-probe"
#endif
#ifndef VERSION
#define VERSION "1"
#endif
#ifndef CLASS
#define CLASS UPCALL_CLASS_INSPECTION
#endif
#ifndef OPS
#define OPS                                                                                  \
    (RW | UPCALL_OP_BIT(UPCALL_FLUSH) | UPCALL_OP_BIT(UPCALL_DISCARD) |                      \
     UPCALL_OP_BIT(UPCALL_WRITE_ZEROES))
#endif
#ifndef SEES
#define SEES 0
#endif
#ifndef CHANGES
#define CHANGES 0
#endif

enum mode { PASS, WATCH, HOLD, BLOCKING };

static const struct upcall_services *up;

/* Held requests on their way to the thread that answers them. A power of two. */
#define HELD_MAX 4096u

struct probe {
    struct upcall_instance *inst;
    enum mode mode;
    pthread_t answerer;
    pthread_mutex_t lock; /* one of several channels puts */
    _Atomic bool ending;
    _Atomic uint32_t put;
    uint32_t taken;
    struct upcall_request *_Atomic held[HELD_MAX];
};

static int32_t probe_load(const struct upcall_services *services) {
    up = services;
    return 0;
}

/* Looks in vain after which the answering thread takes itself to be idle, about 1 ms. */
#define LOOKS_MAX 3000u

static void *answer_held(void *arg) {
    struct probe *p = arg;
    uint32_t looks = 0;
    while (!atomic_load_explicit(&p->ending, memory_order_relaxed)) {
        if (p->taken == atomic_load_explicit(&p->put, memory_order_acquire)) {
            /* Others are measured on this core meanwhile: it is theirs. */
            if (++looks < LOOKS_MAX)
                sched_yield();
            else
                usleep(10000);
            continue;
        }
        looks = 0;
        struct upcall_request *req =
            atomic_load_explicit(&p->held[p->taken++ % HELD_MAX], memory_order_relaxed);
        up->answer(req, UPCALL_PASS, 0);
    }
    return NULL;
}

static enum mode mode_of(const char *text) {
    static const char *const names[] = { "pass", "watch", "hold", "blocking" };
    for (uint32_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        if (strcmp(text, names[i]) == 0)
            return (enum mode)i;
    return PASS;
}

static int32_t probe_open(struct upcall_instance *inst, void **self) {
    struct probe *p = calloc(1, sizeof(*p));
    if (!p)
        return -ENOMEM;
    p->inst = inst;
    p->mode = mode_of(up->param_string(inst, "mode"));
    pthread_mutex_init(&p->lock, NULL);
    if (p->mode == HOLD) {
        int error = pthread_create(&p->answerer, NULL, answer_held, p);
        if (error) {
            free(p);
            return -error;
        }
    }
    *self = p;
    return 0;
}

static void probe_close(void *self) {
    struct probe *p = self;
    atomic_store(&p->ending, true);
    if (p->mode == HOLD)
        pthread_join(p->answerer, NULL);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

static void answer_blocking(void *arg) {
    up->answer(arg, UPCALL_PASS, 0);
}

static uint32_t hold(struct probe *p, struct upcall_request *req) {
    pthread_mutex_lock(&p->lock);
    uint32_t at = atomic_load_explicit(&p->put, memory_order_relaxed);
    atomic_store_explicit(&p->held[at % HELD_MAX], req, memory_order_relaxed);
    atomic_store_explicit(&p->put, at + 1, memory_order_release);
    pthread_mutex_unlock(&p->lock);
    return UPCALL_HOLD;
}

/* One byte in each 512: what the smallest observer of data touches. */
static volatile unsigned char sum_of_all;

static void look_at(const struct upcall_request *req) {
    const unsigned char *data = req->data;
    unsigned char sum = 0;
    for (uint32_t at = 0; at < req->length; at += 512)
        sum = (unsigned char)(sum + data[at]);
    sum_of_all = sum;
}

static void change(const struct upcall_request *req) {
    unsigned char *data = req->data;
    for (uint32_t at = 0; at < req->length; at += 512)
        data[at] ^= 1;
}

static uint32_t probe_start(void *self, struct upcall_request *req) {
    struct probe *p = self;
    if (req->op == UPCALL_WRITE && req->data) {
        if (CHANGES)
            change(req);
        else
            look_at(req);
    }
    switch (p->mode) {
    case WATCH:
        return UPCALL_WATCH;
    case HOLD:
        return hold(p, req);
    case BLOCKING:
        return up->run_blocking(p->inst, answer_blocking, req) ? UPCALL_PASS : UPCALL_HOLD;
    case PASS:
        break;
    }
    /* Data of a read is there on its way up only. */
    return (SEES | CHANGES) && req->op == UPCALL_READ ? UPCALL_WATCH : UPCALL_PASS;
}

static uint32_t probe_done(void *self, struct upcall_request *req) {
    (void)self;
    if (req->op == UPCALL_READ && req->data && req->status == 0) {
        if (CHANGES)
            change(req);
        else
            look_at(req);
    }
    return UPCALL_PASS;
}

static const struct upcall_param params[] = {
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_CHOICE, .name = "mode",
      .doc = "What to answer.", .default_value = "pass",
      .choices = "pass|watch|hold|blocking" },
};

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = NAME,
    .version = VERSION,
    .vendor = "Upcall",
    .summary = "Does as little as a filter can, for the benchmark",
    .filter_class = CLASS,
    .ops = OPS,
    .sees = SEES,
    .changes = CHANGES,
    .param_count = 1,
    .params = params,
    .load = probe_load,
    .open = probe_open,
    .close = probe_close,
    .start_io = probe_start,
    .io_done = probe_done,
};
