/*
 * Tests of @NAME@ alone: its table is called as the filter host would call it, with services
 * that only remember. `upcall filter check` then runs it for real.
 */
#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <upcall/filter.h>

extern const struct upcall_filter upcall_filter;

static int64_t protect;
static uint64_t counted[2];

static int64_t param_int(struct upcall_instance *instance, const char *name)
{
    (void)instance;
    assert(strcmp(name, "protect") == 0);
    return protect;
}

static int32_t counter(struct upcall_instance *instance, const char *name)
{
    (void)instance;
    return strcmp(name, "failed") == 0;
}

static void counter_add(struct upcall_instance *instance, int32_t index, uint64_t delta)
{
    (void)instance;
    counted[index] += delta;
}

static const struct upcall_services services = {
    .size = sizeof(services),
    .abi_version = UPCALL_ABI_VERSION,
    .param_int = param_int,
    .counter = counter,
    .counter_add = counter_add,
};

static uint32_t start(void *self, uint8_t op, uint64_t offset, int32_t *status)
{
    struct upcall_request request = {
        .size = sizeof(request), .op = op, .offset = offset, .length = 512,
    };
    uint32_t verdict = upcall_filter.start_io(self, &request);
    *status = request.status;
    return verdict;
}

int main(void)
{
    void *self = NULL;
    int32_t status = 0;

    protect = 4096;
    assert(upcall_filter.load(&services) == 0);
    assert(upcall_filter.open(NULL, &self) == 0);

    assert(start(self, UPCALL_WRITE, 0, &status) == UPCALL_FAIL && status == -EROFS);
    assert(start(self, UPCALL_READ, 0, &status) == UPCALL_WATCH);
    assert(start(self, UPCALL_WRITE, 4096, &status) == UPCALL_WATCH);
    assert(counted[0] == 3);

    struct upcall_request done = { .size = sizeof(done), .op = UPCALL_READ, .status = -EIO };
    assert(upcall_filter.io_done(self, &done) == UPCALL_PASS && done.status == -EIO);
    assert(counted[1] == 1);

    upcall_filter.close(self);
    puts("test: all right");
    return 0;
}
