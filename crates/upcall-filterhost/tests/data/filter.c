/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter for the tests of this crate: good by default, and bad in one way for each
 * macro that a test defines when it compiles this.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <upcall/filter.h>

#ifndef ABI
#define ABI UPCALL_ABI_VERSION
#endif
#ifndef SEES
#define SEES UPCALL_OP_BIT(UPCALL_WRITE)
#endif
#ifndef CHANGES
#define CHANGES 0
#endif

static const struct upcall_services *services;
static struct upcall_instance *instance;
static int32_t requests;

static int32_t load(const struct upcall_services *given) {
    services = given;
    services->log(NULL, UPCALL_LOG_INFO, "loaded\x1b[2J");
#ifdef DIE_IN_LOAD
    kill(getpid(), SIGKILL);
#endif
    return 0;
}

static void unload(void) {
#ifdef SLOW_UNLOAD
    usleep(200000);
#endif
    services->log(NULL, UPCALL_LOG_INFO, "unloaded");
}

static void log_param(const char *name) {
    char line[200];
    const char *text = services->param_string(instance, name);
    snprintf(line, sizeof(line), "%s is %lld, \"%s\"", name,
             (long long)services->param_int(instance, name), text ? text : "(absent)");
    services->log(instance, UPCALL_LOG_DEBUG, line);
}

static int32_t open_instance(struct upcall_instance *inst, void **self) {
    instance = inst;
    *self = inst;
    requests = services->counter(inst, "requests");
    log_param("key");
    log_param("rate");
    log_param("fast");
    log_param("notes");
    int fd = services->param_fd(inst, "notes");
    if (fd >= 0) {
        char text[100];
        ssize_t length = read(fd, text, sizeof(text) - 1);
        text[length < 0 ? 0 : length] = 0;
        services->log(inst, UPCALL_LOG_WARN, text);
    }
#ifdef HANG_IN_OPEN
    for (;;)
        pause();
#endif
#ifdef REFUSE_OPEN
    services->log(inst, UPCALL_LOG_ERROR, "not today");
    return -13;
#endif
    return 0;
}

static void close_instance(void *self) {
    services->log(self, UPCALL_LOG_INFO, "closed");
}

static uint32_t start_io(void *self, struct upcall_request *req) {
    services->counter_add(self, requests, 1);
#ifdef SCRIBBLE
    if (req->data)
        ((volatile unsigned char *)req->data)[0] ^= 0xff;
#endif
    req->context = (void *)(uintptr_t)req->length;
    return UPCALL_WATCH;
}

static uint32_t io_done(void *self, struct upcall_request *req) {
    (void)self;
    if (req->context != (void *)(uintptr_t)req->length) {
        req->status = -5;
        return UPCALL_FAIL;
    }
    return UPCALL_PASS;
}

static int32_t event(void *self, uint32_t event) {
    (void)self;
    return event == UPCALL_EVENT_STUN ? -16 : 0;
}

static const struct upcall_param params[] = {
    { sizeof(*params), UPCALL_PARAM_INT, "key", "A number.", "5", NULL, 0, 9 },
    { sizeof(*params), UPCALL_PARAM_SIZE, "rate", "Bytes.", "1M", NULL, 1, 1 << 30 },
    { sizeof(*params), UPCALL_PARAM_BOOL, "fast", "Yes or no.", "no", NULL, 0, 0 },
    { sizeof(*params), UPCALL_PARAM_FILE_READ, "notes", "To read.", NULL, NULL, 0, 0 },
};

#ifndef NO_SYMBOL
UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = ABI,
    .name = "test-filter",
    .version = "1",
    .vendor = "upcall",
    .summary = "for tests",
    .filter_class = UPCALL_CLASS_INSPECTION,
    .ops = UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE) | UPCALL_OP_BIT(UPCALL_FLUSH),
    .sees = SEES,
    .changes = CHANGES,
    .param_count = sizeof(params) / sizeof(*params),
    .params = params,
    .load = load,
    .unload = unload,
    .open = open_instance,
    .close = close_instance,
    .start_io = start_io,
    .io_done = io_done,
    .event = event,
};
#else
int unrelated(void) {
    return load(NULL) + open_instance(NULL, NULL) + (int)start_io(NULL, NULL) + event(NULL, 0) +
           (int)io_done(NULL, NULL) + (unload(), close_instance(NULL), (int)sizeof(params));
}
#endif
