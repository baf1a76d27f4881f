/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter for the tests of chain changes. It counts what it sees, and hands the count to who
 * takes its place; with -DCHANGES it adds `key` to each byte below it. `bad` says how it is bad.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <upcall/filter.h>

#define RW (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE))
#define ALL (RW | UPCALL_OP_BIT(UPCALL_FLUSH) | UPCALL_OP_BIT(UPCALL_DISCARD) | \
             UPCALL_OP_BIT(UPCALL_WRITE_ZEROES))
#ifdef CHANGES
#define NAME "changer"
#define CLASS UPCALL_CLASS_ENCRYPTION
#define OPS RW
#define MASK RW
#else
#define NAME "watcher"
#define CLASS UPCALL_CLASS_INSPECTION
#define OPS ALL
#define MASK 0
#endif
#ifndef VERSION
#define VERSION "1"
#endif

static const struct upcall_services *up;

struct changing {
    struct upcall_instance *inst;
    const char *bad;
    unsigned char key;
    atomic_uint seen;
    int32_t counter;
    atomic_bool stunned;
};

static int is(const struct changing *c, const char *bad) { return strcmp(c->bad, bad) == 0; }

static void hang(void) {
    for (;;)
        pause();
}

static int32_t load(const struct upcall_services *services) {
    up = services;
    return 0;
}

static int32_t open_instance(struct upcall_instance *inst, void **self) {
    struct changing *c = calloc(1, sizeof(*c));
    c->inst = inst;
    c->bad = up->param_string(inst, "bad");
    c->key = (unsigned char)up->param_int(inst, "key");
    c->counter = up->counter(inst, "seen");
    if (is(c, "refuse-open"))
        return -EACCES;
    if (is(c, "die-open"))
        kill(getpid(), SIGKILL);
    if (is(c, "hang-open"))
        hang();
    if (is(c, "slow-open")) {
        up->log(inst, UPCALL_LOG_INFO, "event opening " VERSION);
        usleep(400000);
    }
    *self = c;
    up->log(inst, UPCALL_LOG_INFO, "event open " VERSION);
    return 0;
}

static void close_instance(void *self) {
    struct changing *c = self;
    up->log(c->inst, UPCALL_LOG_INFO, "event close " VERSION);
    if (is(c, "hang-close"))
        hang();
    free(c);
}

#ifdef CHANGES
static void add(struct upcall_request *req, unsigned char key) {
    unsigned char *data = req->data;
    for (uint32_t i = 0; data && i < req->length; i++)
        data[i] = (unsigned char)(data[i] + key);
}
#endif

static uint32_t start_io(void *self, struct upcall_request *req) {
    struct changing *c = self;
    if (atomic_load(&c->stunned))
        abort(); /* no request comes while the disk stands still */
    uint32_t seen = atomic_fetch_add(&c->seen, 1) + 1;
    up->counter_add(c->inst, c->counter, 1);
    if (is(c, "die") || (is(c, "die-later") && seen > 20))
        kill(getpid(), SIGKILL);
    if (is(c, "hang"))
        hang();
    if (is(c, "slow") && seen == 1)
        usleep(300 * 1000);
    if (is(c, "fail")) {
        req->status = -EIO;
        return UPCALL_FAIL;
    }
    if (is(c, "nonsense"))
        return 77;
#ifdef CHANGES
    if (req->op == UPCALL_WRITE) {
        add(req, c->key);
        return UPCALL_PASS;
    }
#endif
    return UPCALL_WATCH;
}

static uint32_t io_done(void *self, struct upcall_request *req) {
    struct changing *c = self;
    (void)req;
    if (is(c, "die-done"))
        kill(getpid(), SIGKILL);
#ifdef CHANGES
    if (req->op == UPCALL_READ && req->status == 0)
        add(req, (unsigned char)(256 - c->key));
#endif
    return UPCALL_PASS;
}

static int32_t event(void *self, uint32_t event) {
    static const char *const names[] = { "", "event stun", "event unstun", "event attach",
                                         "event detach", "event migrate-out",
                                         "event migrate-in" };
    struct changing *c = self;
    if (event == UPCALL_EVENT_STUN && is(c, "refuse-stun"))
        return -EBUSY;
    if (event == UPCALL_EVENT_STUN && is(c, "hang-stun"))
        hang();
    if (event == UPCALL_EVENT_ATTACH && is(c, "refuse-attach"))
        return -EBUSY;
    if (event == UPCALL_EVENT_STUN)
        atomic_store(&c->stunned, true);
    if (event == UPCALL_EVENT_UNSTUN)
        atomic_store(&c->stunned, false);
    if (event <= UPCALL_EVENT_MIGRATE_IN)
        up->log(c->inst, UPCALL_LOG_INFO, names[event]);
    return 0;
}

static int32_t save_state(void *self, void *buf, uint32_t size) {
    struct changing *c = self;
    if (is(c, "refuse-save"))
        return -EBUSY;
    return snprintf(buf, size, "%u", atomic_load(&c->seen));
}

static int32_t load_state(void *self, const void *buf, uint32_t length) {
    struct changing *c = self;
    char text[32] = "", line[64];
    if (length >= sizeof(text) || is(c, "refuse-state"))
        return -EINVAL;
    memcpy(text, buf, length);
    atomic_store(&c->seen, (unsigned)strtoul(text, NULL, 10));
    snprintf(line, sizeof(line), "event load %s seen %s", VERSION, text);
    up->log(c->inst, UPCALL_LOG_INFO, line);
    return 0;
}

static const struct upcall_param params[] = {
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_STRING, .name = "bad",
      .doc = "How it is bad.", .default_value = "no", .max = 20 },
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_INT, .name = "key",
      .doc = "What it adds.", .default_value = "7", .max = 255 },
};

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = NAME,
    .version = VERSION,
    .vendor = "test",
    .summary = "for tests of chain changes",
    .filter_class = CLASS,
    .ops = OPS,
    .sees = MASK,
    .changes = MASK,
    .param_count = 2,
    .params = params,
    .load = load,
    .open = open_instance,
    .close = close_instance,
    .start_io = start_io,
    .io_done = io_done,
    .event = event,
    .save_state = save_state,
    .load_state = load_state,
};
