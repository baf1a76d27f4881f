/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter that keeps a state: how often it was opened, as text. It logs what it found.
 * A write to the disk appends the request's first byte and answers when that is durable.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <upcall/filter.h>

#ifndef FLAGS
#define FLAGS UPCALL_FILTER_SIDECAR
#endif

static const struct upcall_services *services;

static int32_t load(const struct upcall_services *given) {
    services = given;
    return 0;
}

static int32_t open_instance(struct upcall_instance *inst, void **self) {
    char state[100], line[200];
    *self = inst;
    int32_t length = services->sidecar_read(inst, state, sizeof(state) - 1);
    state[length > 0 ? length : 0] = 0;
    snprintf(line, sizeof(line), "found %d %s", length, state);
    services->log(inst, UPCALL_LOG_INFO, line);
#ifdef FILL
    if (length < 0) /* as damaged: begin anew */
        length = 0;
#endif
    if (length < 0)
        return 0;
    state[length] = 'o';
    int32_t wrote = services->sidecar_write(inst, state, (uint32_t)length + 1);
    int32_t synced = services->sidecar_sync(inst);
    snprintf(line, sizeof(line), "wrote %d synced %d", wrote, synced);
    services->log(inst, UPCALL_LOG_INFO, line);
    static char large[UPCALL_SIDECAR_MAX + 1];
    if (services->sidecar_write(inst, large, sizeof(large)) != -7 /* E2BIG */)
        return -5;
    return 0;
}

static void append(void *arg) {
    struct upcall_request *req = arg;
    struct upcall_instance *inst = req->context;
    static char state[UPCALL_SIDECAR_MAX];
    int32_t length = services->sidecar_read(inst, state, sizeof(state));
    state[length] = *(const char *)req->data;
    services->sidecar_write(inst, state, (uint32_t)length + 1);
    int32_t error = services->sidecar_sync(inst);
    services->answer(req, error ? UPCALL_FAIL : UPCALL_PASS, error);
}

static uint32_t start_io(void *self, struct upcall_request *req) {
    req->context = self;
    if (services->run_blocking(self, append, req) != 0)
        return UPCALL_PASS;
    return UPCALL_HOLD;
}

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "keeper",
    .version = "1",
    .vendor = "upcall",
    .summary = "for tests",
    .filter_class = UPCALL_CLASS_INSPECTION,
    .flags = FLAGS,
    .ops = UPCALL_OP_BIT(UPCALL_WRITE),
    .sees = UPCALL_OP_BIT(UPCALL_WRITE),
    .load = load,
    .open = open_instance,
    .start_io = start_io,
};
