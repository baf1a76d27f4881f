/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Says in its log what its disk consists of when it is opened, and what it is told when it asks wrongly. */
#include <errno.h>
#include <stdio.h>

#include <upcall/filter.h>

static const struct upcall_services *services;

static int32_t load(const struct upcall_services *given) {
    services = given;
    return 0;
}

static void say(struct upcall_instance *inst, uint64_t at, int32_t count,
                const struct upcall_extent *extents) {
    for (int32_t i = 0; i < count; at += extents[i++].length) {
        char line[100];
        snprintf(line, sizeof(line), "extent %llu %llu %u", (unsigned long long)at,
                 (unsigned long long)extents[i].length, extents[i].kind);
        services->log(inst, UPCALL_LOG_INFO, line);
    }
}

static int32_t open_instance(struct upcall_instance *inst, void **self) {
    *self = inst;
    static struct upcall_extent extents[3];
    uint64_t end = services->disk(inst, 0)->capacity;
    if (services->extents(inst, 0, 1, 512, extents, 3) != -EINVAL ||
        services->extents(inst, 0, end, 512, extents, 3) != -EINVAL ||
        services->extents(inst, 0, 0, UINT64_MAX - 511, extents, 3) != -EINVAL ||
        services->extents(inst, 0, 0, 512, extents, 0) != -EINVAL ||
        services->extents(inst, 7, 0, 512, extents, 3) != -ENODEV)
        return -EPROTO;
    for (uint64_t at = 0; at < end;) {
        int32_t count = services->extents(inst, 0, at, end - at, extents, 3);
        if (count <= 0)
            return count ? count : -EPROTO;
        say(inst, at, count, extents);
        for (int32_t i = 0; i < count; i++)
            at += extents[i].length;
    }
    return 0;
}

static uint32_t start_io(void *self, struct upcall_request *req) {
    (void)req;
    struct upcall_extent extent;
    return services->extents(self, 0, 0, 512, &extent, 1) == -EDEADLK ? UPCALL_PASS : UPCALL_FAIL;
}

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "holes",
    .version = "1",
    .vendor = "Upcall",
    .summary = "Says what its disk consists of",
    .filter_class = UPCALL_CLASS_INSPECTION,
    .flags = UPCALL_FILTER_EXTENTS,
    .ops = UPCALL_OP_BIT(UPCALL_READ),
    .load = load,
    .open = open_instance,
    .start_io = start_io,
};
