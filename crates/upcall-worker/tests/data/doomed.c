/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter that dies or hangs at a named point of its work. What it does else: it multiplies
 * each byte of a write by 3, and undoes that in reads, so that zeroes stay zeroes and a page
 * that is changed twice is seen. The points are in a file that the test writes (-DTRIGGER).
 *
 * Some points are the filter's own; at others the filter host is in its own code, and asks
 * upcall_test_point() (see points.c of the filter host).
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <upcall/filter.h>

#define ALL 0x3eu
#define RW (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE))

/* As in recovery.rs. */
enum {
    NOWHERE, START, HALF, CHANGED, HELD, HELD_HALF, HELD_CHANGED, ANSWERED, ISSUE_BEFORE,
    ISSUE_AFTER, ISSUE_DONE, DONE, DONE_HALF, DONE_CHANGED, DONE_HELD, DONE_ANSWERED, OPEN, LOAD,
    CLOSE, UNLOAD, CANCEL, CANCELLED,
};
/* A point of the host's is FROM_HOST + PHASES * point + phase; what the host was about: */
#define FROM_HOST 100u
#define PHASES 20u
enum {
    LIFE, OF_START, OF_DONE, OF_HELD, OF_ANSWER, OF_ISSUE, OF_ISSUED, OF_CANCEL, OF_DONE_ANSWER,
};
enum { KILL, STOP, SPIN };

/* As in the host's host.h and wire.h. */
enum { HOST_READY = 1, HOST_TAKEN, HOST_DECIDED, HOST_PUTTING, HOST_PUT, HOST_RELEASED };
enum { WIRE_START = 1, WIRE_DONE, WIRE_CANCEL, WIRE_ISSUED };
enum { WIRE_VERDICT = 1, WIRE_ISSUE, WIRE_HELD };

/* Written by the test while nothing is in flight. */
struct trigger {
    _Atomic uint32_t at; /* of the points, the next one; taken by one thread */
    uint32_t how;
    uint32_t op;         /* 0: any */
    uint32_t points[4];
    _Atomic uint32_t holds; /* of requests that are to be cancelled, those that it has had */
};

static const struct upcall_services *up;
static struct trigger *trigger;
/* What this thread was last in a callback for. */
static _Thread_local uint32_t phase_here;

static int find_trigger(void)
{
    if (trigger)
        return 0;
    int fd = open(TRIGGER, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    void *at = mmap(NULL, sizeof(struct trigger), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED)
        return -errno;
    trigger = at;
    return 0;
}

static void die(void)
{
    if (trigger->how == KILL)
        kill(getpid(), SIGKILL);
    if (trigger->how == STOP)
        kill(getpid(), SIGSTOP);
    for (;;)
        if (trigger->how != SPIN)
            pause();
}

static uint32_t next_point(uint32_t op)
{
    uint32_t at = atomic_load(&trigger->at);
    if (at >= 4 || (op && trigger->op && trigger->op != op))
        return NOWHERE;
    return trigger->points[at];
}

static void reach(uint32_t point, uint32_t op)
{
    uint32_t at = atomic_load(&trigger->at);
    if (at >= 4 || next_point(op) != point)
        return;
    if (atomic_compare_exchange_strong(&trigger->at, &at, at + 1))
        die();
}

static uint32_t phase_of(uint32_t point, uint32_t kind)
{
    switch (point) {
    case HOST_READY: case HOST_TAKEN: case HOST_DECIDED:
        return kind == WIRE_START    ? OF_START
               : kind == WIRE_DONE   ? OF_DONE
               : kind == WIRE_CANCEL ? OF_CANCEL
                                     : OF_ISSUED;
    case HOST_PUTTING: case HOST_PUT:
        return kind == WIRE_HELD ? OF_HELD : kind == WIRE_ISSUE ? OF_ISSUE : phase_here;
    case HOST_RELEASED:
        return phase_here;
    default:
        return LIFE;
    }
}

/* The host has said that it holds a request, since one was to be held. */
static _Atomic int hold_is_said;

/* The host is at this point of its own. */
__attribute__((visibility("default")))
void upcall_test_point(uint32_t point, uint32_t kind, uint32_t op)
{
    if (find_trigger() == 0)
        reach(FROM_HOST + PHASES * point + phase_of(point, kind), op);
    if (point == HOST_PUT && kind == WIRE_HELD)
        atomic_store(&hold_is_said, 1);
}

/* A request that is answered before the host says that it is held, never is: what is to happen
 * while it says so would happen to another one. With several in flight it may be another's hold,
 * so not for ever. */
static void wait_until_held(void)
{
    for (int ms = 0; ms < 1000 && !atomic_load(&hold_is_said); ms++)
        usleep(1000);
}

static uint32_t hold(struct upcall_instance *inst, void (*answers)(void *), struct upcall_request *req)
{
    atomic_store(&hold_is_said, 0);
    if (up->run_blocking(inst, answers, req))
        abort();
    return UPCALL_HOLD;
}

/* Whether the next point is one where the host is about this. */
static int next_is_of(uint32_t next, uint32_t phase)
{
    return next >= FROM_HOST && (next - FROM_HOST) % PHASES == phase;
}

static void change(unsigned char *data, uint32_t length, unsigned char factor)
{
    for (uint32_t i = 0; i < length; i++)
        data[i] = (unsigned char)(data[i] * factor);
}

/* Changes the data, and may die before, in the middle, and after. */
static void work(struct upcall_request *req, int changes, unsigned char factor, uint32_t half,
                 uint32_t whole)
{
    uint32_t length = changes && req->data ? req->length : 0;
    unsigned char *data = req->data;
    if (length)
        change(data, length / 2, factor);
    reach(half, req->op);
    if (length)
        change(data + length / 2, length - length / 2, factor);
    reach(whole, req->op);
}

struct doomed {
    struct upcall_instance *inst;
};

static int32_t doomed_load(const struct upcall_services *services)
{
    up = services;
    int error = find_trigger();
    if (error)
        return error;
    reach(LOAD, 0);
    return 0;
}

static int32_t doomed_open(struct upcall_instance *inst, void **self)
{
    struct doomed *d = calloc(1, sizeof *d);
    if (!d)
        return -ENOMEM;
    d->inst = inst;
    *self = d;
    reach(OPEN, 0);
    return 0;
}

static void doomed_close(void *self)
{
    reach(CLOSE, 0);
    free(self);
}

static void doomed_unload(void) { reach(UNLOAD, 0); }

static void held_start(void *arg)
{
    struct upcall_request *req = arg;
    uint32_t op = req->op;
    wait_until_held();
    phase_here = OF_ANSWER;
    reach(HELD, op);
    work(req, op == UPCALL_WRITE, 3, HELD_HALF, HELD_CHANGED);
    up->answer(req, UPCALL_WATCH, 0);
    reach(ANSWERED, op);
}

static void held_done(void *arg)
{
    struct upcall_request *req = arg;
    uint32_t op = req->op;
    wait_until_held();
    phase_here = OF_DONE_ANSWER;
    reach(DONE_HELD, op);
    work(req, op == UPCALL_READ && req->status == 0, 171, NOWHERE + 100, NOWHERE + 100);
    up->answer(req, UPCALL_PASS, req->status);
    reach(DONE_ANSWERED, op);
}

static void issued(void *arg, int32_t status)
{
    struct upcall_request *req = arg;
    uint32_t op = req->op;
    reach(ISSUE_DONE, op);
    work(req, op == UPCALL_WRITE, 3, NOWHERE + 100, NOWHERE + 100);
    up->answer(req, status ? UPCALL_FAIL : UPCALL_WATCH, status);
}

static uint32_t doomed_start(void *self, struct upcall_request *req)
{
    struct doomed *d = self;
    phase_here = OF_START;
    reach(START, req->op);
    uint32_t next = next_point(req->op);
    if (next == CANCEL || next == CANCELLED || next_is_of(next, OF_CANCEL)) {
        req->context = req;
        atomic_fetch_add(&trigger->holds, 1);
        return UPCALL_HOLD;
    }
    if ((next >= HELD && next <= ANSWERED) || next_is_of(next, OF_HELD) ||
        next_is_of(next, OF_ANSWER)) {
        return hold(d->inst, held_start, req);
    }
    if ((next >= ISSUE_BEFORE && next <= ISSUE_DONE) || next_is_of(next, OF_ISSUE) ||
        next_is_of(next, OF_ISSUED)) {
        struct upcall_issue io;
        memset(&io, 0, sizeof io);
        io.size = sizeof io;
        io.op = UPCALL_FLUSH;
        io.done = issued;
        io.arg = req;
        reach(ISSUE_BEFORE, req->op);
        uint32_t op = req->op;
        if (up->issue(d->inst, &io))
            abort();
        reach(ISSUE_AFTER, op);
        return UPCALL_HOLD;
    }
    work(req, req->op == UPCALL_WRITE, 3, HALF, CHANGED);
    return UPCALL_WATCH;
}

static uint32_t doomed_done(void *self, struct upcall_request *req)
{
    struct doomed *d = self;
    phase_here = OF_DONE;
    reach(DONE, req->op);
    uint32_t next = next_point(req->op);
    if (next == DONE_HELD || next == DONE_ANSWERED || next_is_of(next, OF_DONE_ANSWER)) {
        return hold(d->inst, held_done, req);
    }
    work(req, req->op == UPCALL_READ && req->status == 0, 171, DONE_HALF, DONE_CHANGED);
    return UPCALL_PASS;
}

static void doomed_cancel(void *self, void *context)
{
    struct upcall_request *req = context;
    (void)self;
    if (!req)
        return;
    reach(CANCEL, 0);
    up->answer(req, UPCALL_FAIL, -ECANCELED);
    reach(CANCELLED, 0);
}

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = NAME,
    .version = "1",
    .vendor = "upcall",
    .summary = "Dies where it is told, for tests",
    .filter_class = UPCALL_CLASS_ENCRYPTION,
    .flags = UPCALL_FILTER_ISSUES,
    .ops = ALL,
    .sees = RW,
    .changes = RW,
    .load = doomed_load,
    .unload = doomed_unload,
    .open = doomed_open,
    .close = doomed_close,
    .start_io = doomed_start,
    .io_done = doomed_done,
    .cancel = doomed_cancel,
};
