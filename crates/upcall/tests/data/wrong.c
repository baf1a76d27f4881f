/*
 * Filters that break one rule each; WRONG chooses which. The conformance kit must find every
 * one of them, and say the right thing.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <upcall/filter.h>

#define NOTHING 0           /* right */
#define NEVER_ANSWERS 1     /* holds every 50th request and forgets it */
#define ONE_WAY 2           /* changes what is written and never back */
#define ANSWERS_TWICE 3     /* answers held requests twice */
#define LEAKS_MEMORY 4      /* forgets 256 bytes for each request */
#define CRASHES_ON_FLUSH 5
#define LOSES_WRITES 6      /* says done to some writes and does not do them */
#define WRONG_VERDICT 7     /* says done without having said that it may */
#define LEAKS_DESCRIPTORS 8
#define ENDS_BADLY 9        /* crashes when it is unloaded */
#define RACES 10            /* works in memory that all threads share */
#define IGNORES_DISCARD 11  /* says done to discards and does nothing */
#define IGNORES_CANCEL 12   /* forgets held requests, and does not answer when cancelled */
#define SLOW_TO_CLOSE 13    /* takes ten seconds to close */
#define FAILS_SOME 14       /* right, too: it fails every seventh request */

#define BIT(op) UPCALL_OP_BIT(op)
#define ALL (BIT(UPCALL_READ) | BIT(UPCALL_WRITE) | BIT(UPCALL_FLUSH) | \
             BIT(UPCALL_DISCARD) | BIT(UPCALL_WRITE_ZEROES))
#define DATA (BIT(UPCALL_READ) | BIT(UPCALL_WRITE))

static const struct upcall_services *services;
static unsigned count;
static void *volatile forgotten; /* volatile, so that the compiler keeps the allocation */
static unsigned char shared[4 << 20];

static int32_t load(const struct upcall_services *given)
{
    services = given;
    return 0;
}

static void unload(void)
{
    if (WRONG == ENDS_BADLY)
        abort();
}

static void flip(struct upcall_request *request, unsigned char key)
{
    unsigned char *data = request->data;

    for (uint32_t i = 0; i < request->length; i++)
        data[i] ^= key;
}

static uint32_t start_io(void *self, struct upcall_request *request)
{
    unsigned number = __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);

    (void)self;
    switch (WRONG) {
    case NEVER_ANSWERS:
        return number % 50 ? UPCALL_WATCH : UPCALL_HOLD;
    case IGNORES_CANCEL:
        /* Right until the kit, after 20200 requests, begins to stop queues. */
        return number > 20200 && number % 4 == 0 ? UPCALL_HOLD : UPCALL_WATCH;
    case ONE_WAY:
        if (request->op == UPCALL_WRITE)
            flip(request, 0x55);
        return UPCALL_PASS;
    case ANSWERS_TWICE:
        services->answer(request, UPCALL_PASS, 0);
        services->answer(request, UPCALL_PASS, 0);
        return UPCALL_HOLD;
    case LEAKS_MEMORY:
        forgotten = malloc(256);
        memset(forgotten, 1, 256);
        return UPCALL_PASS;
    case CRASHES_ON_FLUSH:
        if (request->op == UPCALL_FLUSH)
            *(volatile int *)8 = 1;
        return UPCALL_PASS;
    case LOSES_WRITES:
        return request->op == UPCALL_WRITE && number % 20 == 0 ? UPCALL_DONE : UPCALL_PASS;
    case WRONG_VERDICT:
        return request->op == UPCALL_READ ? UPCALL_DONE : UPCALL_PASS;
    case LEAKS_DESCRIPTORS:
        if (number % 100 == 0)
            (void)!dup(0);
        return UPCALL_PASS;
    case RACES:
        if (request->op == UPCALL_WRITE) {
            memcpy(shared, request->data, request->length);
            usleep(50);
            memcpy(request->data, shared, request->length);
        }
        return UPCALL_PASS;
    case FAILS_SOME:
        request->status = -ENOSPC;
        return number % 7 ? UPCALL_PASS : UPCALL_FAIL;
    case IGNORES_DISCARD:
        return request->op == UPCALL_DISCARD ? UPCALL_DONE : UPCALL_PASS;
    }
    return UPCALL_WATCH;
}

static void close_slowly(void *self)
{
    (void)self;
    sleep(WRONG == SLOW_TO_CLOSE ? 10 : 0);
}

static uint32_t io_done(void *self, struct upcall_request *request)
{
    (void)self;
    (void)request;
    return UPCALL_PASS;
}

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "wrong",
    .version = "1",
    .vendor = "Upcall",
    .summary = "Breaks a rule",
    .filter_class = UPCALL_CLASS_ENCRYPTION,
    .ops = ALL,
    .sees = WRONG == ONE_WAY || WRONG == RACES ? DATA : 0,
    .changes = WRONG == ONE_WAY || WRONG == RACES ? DATA : 0,
    .answers = WRONG == LOSES_WRITES ? BIT(UPCALL_WRITE)
             : WRONG == IGNORES_DISCARD ? BIT(UPCALL_DISCARD) : 0,
    .load = load,
    .unload = unload,
    .close = close_slowly,
    .start_io = start_io,
    .io_done = io_done,
};
