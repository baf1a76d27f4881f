/*
 * @NAME@: a filter for Upcall.
 *
 * It watches every request of a disk and counts those that failed; and, if told so, it
 * refuses to write to the first bytes of the disk. Begin here and make it yours: what each
 * function may do is said in include/upcall/filter.h, which is the reference.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

#include <upcall/filter.h>

/* What the framework does for us; handed to load(). */
static const struct upcall_services *services;

/* One instance: this filter on one disk. Callbacks come from several threads at once. */
struct @IDENT@ {
    struct upcall_instance *instance;
    uint64_t protect;    /* bytes at the start of the disk that must not be changed */
    int32_t requests;    /* counters: `upcall top` shows them */
    int32_t failed;
};

static int32_t load(const struct upcall_services *given)
{
    services = given;
    return 0;
}

static int32_t open_instance(struct upcall_instance *instance, void **self)
{
    struct @IDENT@ *mine = calloc(1, sizeof(*mine));
    if (!mine)
        return -ENOMEM;
    mine->instance = instance;
    mine->protect = (uint64_t)services->param_int(instance, "protect");
    mine->requests = services->counter(instance, "requests");
    mine->failed = services->counter(instance, "failed");
    *self = mine;
    return 0;
}

static void close_instance(void *self)
{
    free(self);
}

/* A request on its way down: from the guest towards the disk. */
static uint32_t start_io(void *self, struct upcall_request *request)
{
    struct @IDENT@ *mine = self;

    services->counter_add(mine->instance, mine->requests, 1);
    if (request->op != UPCALL_READ && request->op != UPCALL_FLUSH &&
        request->offset < mine->protect) {
        request->status = -EROFS;
        return UPCALL_FAIL;
    }
    /* WATCH: call io_done() when it is done. UPCALL_PASS would be the end of it for us. */
    return UPCALL_WATCH;
}

/* The same request on its way up, done or failed. */
static uint32_t io_done(void *self, struct upcall_request *request)
{
    struct @IDENT@ *mine = self;

    if (request->status != 0)
        services->counter_add(mine->instance, mine->failed, 1);
    return UPCALL_PASS;
}

static const struct upcall_param params[] = {
    {
        .size = sizeof(struct upcall_param),
        .type = UPCALL_PARAM_SIZE,
        .name = "protect",
        .doc = "Bytes at the start of the disk that must not be changed.",
        .default_value = "0",
        .min = 0,
        .max = INT64_MAX,
    },
};

/*
 * The table. `ops` says which requests come to us. We do not ask to see data (`sees`), so
 * no data is mapped into our process; nor do we change any (`changes`).
 */
UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "@NAME@",
    .version = "0.1.0",
    .vendor = "",
    .summary = "Counts requests, and protects the start of a disk",
    .filter_class = UPCALL_CLASS_INSPECTION,
    .ops = UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE) |
           UPCALL_OP_BIT(UPCALL_FLUSH) | UPCALL_OP_BIT(UPCALL_DISCARD) |
           UPCALL_OP_BIT(UPCALL_WRITE_ZEROES),
    .param_count = sizeof(params) / sizeof(*params),
    .params = params,
    .load = load,
    .open = open_instance,
    .close = close_instance,
    .start_io = start_io,
    .io_done = io_done,
};
