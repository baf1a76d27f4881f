/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* A filter that hands its state, a text, to its next instance, which adds to it. */
#include <errno.h>
#include <string.h>

#include <upcall/filter.h>

static char text[64] = "new";

static uint32_t start_io(void *self, struct upcall_request *req) {
    (void)self;
    (void)req;
    return UPCALL_PASS;
}

static int32_t save_state(void *self, void *buf, uint32_t size) {
    (void)self;
#if defined(NOTHING)
    (void)buf;
    (void)size;
    return -ENOTSUP;
#elif defined(REFUSES)
    (void)buf;
    (void)size;
    return -EBUSY;
#elif defined(LIES)
    (void)buf;
    return (int32_t)size + 1;
#else
    if (size < sizeof(text))
        return -E2BIG;
    memcpy(buf, text, strlen(text));
    return (int32_t)strlen(text);
#endif
}

static int32_t load_state(void *self, const void *buf, uint32_t length) {
    (void)self;
    if (length > sizeof(text) - 2)
        return -EINVAL;
    memcpy(text, buf, length);
    strcpy(text + length, "!");
    return 0;
}

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "state",
    .version = "1",
    .vendor = "test",
    .summary = "hands its state over",
    .filter_class = UPCALL_CLASS_INSPECTION,
    .ops = UPCALL_OP_BIT(UPCALL_READ),
    .start_io = start_io,
    .save_state = save_state,
    .load_state = load_state,
};
