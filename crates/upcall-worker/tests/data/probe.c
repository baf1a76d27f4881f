/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter for the worker's tests. What it declares is set by the compiler (-DOPS=..., and
 * so on); what it does with a request, by the parameter `mode`.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <upcall/filter.h>

#define RW (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE))
#ifndef NAME
#define NAME "probe"
#endif
#ifndef CLASS
#define CLASS UPCALL_CLASS_INSPECTION
#endif
#ifndef OPS
#define OPS (RW | UPCALL_OP_BIT(UPCALL_FLUSH) | UPCALL_OP_BIT(UPCALL_DISCARD) | UPCALL_OP_BIT(UPCALL_WRITE_ZEROES))
#endif
#ifndef SEES
#define SEES 0
#endif
#ifndef CHANGES
#define CHANGES 0
#endif
#ifndef ANSWERS
#define ANSWERS 0
#endif
#ifndef FLAGS
#define FLAGS 0
#endif

static const struct upcall_services *up;

struct probe {
    struct upcall_instance *inst;
    const char *mode;
    int64_t value;
    int32_t seen, done, cancelled;
};

/* A held request, and what its context points to. */
struct held {
    struct probe *probe;
    struct upcall_request *req;
    struct upcall_timer *timer;
    int finished;
};

static int is(const struct probe *p, const char *mode) { return strcmp(p->mode, mode) == 0; }

static int32_t probe_load(const struct upcall_services *services)
{
    up = services;
    return 0;
}

static int32_t probe_open(struct upcall_instance *inst, void **self)
{
    struct probe *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    p->inst = inst;
    p->mode = up->param_string(inst, "mode");
    p->value = up->param_int(inst, "value");
    p->seen = up->counter(inst, "seen");
    p->done = up->counter(inst, "done");
    p->cancelled = up->counter(inst, "cancelled");
    if (is(p, "refuse")) {
        up->log(inst, UPCALL_LOG_ERROR, "told to refuse");
        free(p);
        return -EPERM;
    }
    *self = p;
    return 0;
}

static void probe_close(void *self) { free(self); }

static void answer_held(void *arg)
{
    struct held *h = arg;
    up->timer_stop(h->timer);
    up->answer(h->req, UPCALL_PASS, 0);
    free(h);
}

static void answer_blocking(void *arg)
{
    up->answer(arg, UPCALL_PASS, 0);
}

/* A copy of the request's data, on its way to the same place of disk `value`. */
struct copy {
    struct probe *probe;
    struct upcall_request *req;
    void *data;
};

static void copied(void *arg, int32_t status)
{
    struct copy *c = arg;
    up->buffer_free(c->probe->inst, c->data);
    up->answer(c->req, status ? UPCALL_FAIL : UPCALL_PASS, status);
    free(c);
}

static uint32_t copy(struct probe *p, struct upcall_request *req)
{
    struct copy *c = malloc(sizeof *c);
    if (!c)
        abort();
    c->probe = p;
    c->req = req;
    c->data = up->buffer_alloc(p->inst, req->length);
    if (!c->data)
        abort();
    memcpy(c->data, req->data, req->length);
    struct upcall_issue io;
    memset(&io, 0, sizeof io);
    io.size = sizeof io;
    io.op = UPCALL_WRITE;
    io.offset = req->offset;
    io.length = req->length;
    io.disk = (uint32_t)p->value;
    io.data = c->data;
    io.done = copied;
    io.arg = c;
    int32_t error = up->issue(p->inst, &io);
    if (error) {
        up->buffer_free(p->inst, c->data);
        free(c);
        req->status = error;
        return UPCALL_FAIL;
    }
    return UPCALL_HOLD;
}

static uint32_t probe_start(void *self, struct upcall_request *req)
{
    struct probe *p = self;
    unsigned char *data = req->data;
    up->counter_add(p->inst, p->seen, 1);
    if (is(p, "watch"))
        return UPCALL_WATCH;
    if (is(p, "done") || (is(p, "done-writes") && req->op == UPCALL_WRITE))
        return UPCALL_DONE;
    if (is(p, "fill") && req->op == UPCALL_READ) {
        memset(data, (int)p->value, req->length);
        return UPCALL_DONE;
    }
    if (is(p, "fail")) {
        req->status = (int32_t)-p->value;
        return UPCALL_FAIL;
    }
    if (is(p, "nonsense"))
        return 77;
    if (is(p, "add")) { /* adds `value` to each byte of a write, takes it from a read */
        if (req->op == UPCALL_WRITE)
            for (uint32_t i = 0; i < req->length; i++)
                data[i] = (unsigned char)(data[i] + p->value);
        return req->op == UPCALL_READ ? UPCALL_WATCH : UPCALL_PASS;
    }
    if (is(p, "scribble") && req->op == UPCALL_WRITE) {
        ((volatile unsigned char *)data)[0] = 1; /* the page is read-only: SIGSEGV here */
        return UPCALL_PASS;
    }
    if (is(p, "peek") && req->op == UPCALL_WRITE) {
        req->status = -(int32_t)data[0]; /* says what it sees */
        return data[0] ? UPCALL_FAIL : UPCALL_PASS;
    }
    if (is(p, "hold") || is(p, "stubborn")) {
        struct held *h = calloc(1, sizeof *h);
        if (!h)
            abort();
        h->probe = p;
        h->req = req;
        req->context = h;
        if (is(p, "hold") && p->value)
            h->timer = up->timer_start(p->inst, (uint64_t)p->value, 0, answer_held, h);
        return UPCALL_HOLD;
    }
    if (is(p, "blocking")) {
        if (up->run_blocking(p->inst, answer_blocking, req))
            abort();
        return UPCALL_HOLD;
    }
    if (is(p, "crash"))
        abort();
    if (is(p, "copy") && req->op == UPCALL_WRITE)
        return copy(p, req);
    return UPCALL_PASS;
}

static uint32_t probe_done(void *self, struct upcall_request *req)
{
    struct probe *p = self;
    unsigned char *data = req->data;
    up->counter_add(p->inst, p->done, 1);
    if (is(p, "add") && req->status == 0)
        for (uint32_t i = 0; i < req->length; i++)
            data[i] = (unsigned char)(data[i] - p->value);
    return UPCALL_PASS;
}

static void probe_cancel(void *self, void *context)
{
    struct probe *p = self;
    struct held *h = context;
    up->counter_add(p->inst, p->cancelled, 1);
    if (!is(p, "hold") || !h || p->value)
        return; /* stubborn: says nothing, ever */
    up->answer(h->req, UPCALL_FAIL, -ECANCELED);
    free(h);
}

static const struct upcall_param params[] = {
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_STRING, .name = "mode",
      .doc = "What to do.", .default_value = "pass", .min = 1, .max = 20 },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_INT, .name = "value",
      .doc = "A number for it.", .default_value = "0", .min = 0, .max = 100000 },
};

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = NAME,
    .version = "1",
    .vendor = "upcall",
    .summary = "Does as it is told, for tests",
    .filter_class = CLASS,
    .flags = FLAGS,
    .ops = OPS,
    .sees = SEES,
    .changes = CHANGES,
    .answers = ANSWERS,
    .param_count = 2,
    .params = params,
    .load = probe_load,
    .open = probe_open,
    .close = probe_close,
    .start_io = probe_start,
    .io_done = probe_done,
    .cancel = probe_cancel,
};
