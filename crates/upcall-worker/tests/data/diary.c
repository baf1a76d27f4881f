/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter that does nothing but keep its sidecar: a state full of one number, which is one
 * more with each sync. What it was told is durable it notes in a page that outlives it
 * (-DPAGE, a file); and whoever opens next holds what it finds against that. It dies where
 * the page says (see points.c of the filter host), or is killed from outside.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <upcall/filter.h>

#define WORDS 1500u

/* As in sidecar.rs. */
struct page {
    _Atomic uint32_t durable; /* what a sync has said so of */
    _Atomic uint32_t opened;  /* how often it was found whole and as new as that */
    _Atomic uint32_t wrong;   /* how often not */
    _Atomic uint32_t at;      /* of the points, the next one */
    struct {
        uint32_t point; /* 0: none */
        uint32_t slot;
    } points[2];
};

static const struct upcall_services *up;
static struct page *page;

struct diary {
    struct upcall_instance *inst;
    pthread_t thread;
    _Atomic int stop;
};

__attribute__((visibility("default")))
void upcall_test_point(uint32_t point, uint32_t slot, uint32_t op)
{
    (void)op;
    uint32_t at = page ? atomic_load(&page->at) : 2;
    if (at < 2 && page->points[at].point == point && page->points[at].slot == slot) {
        atomic_store(&page->at, at + 1);
        kill(getpid(), SIGKILL);
    }
}

static int32_t diary_load(const struct upcall_services *services)
{
    up = services;
    int fd = open(PAGE, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    void *at = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED)
        return -errno;
    page = at;
    return 0;
}

/* The number that the state is full of; none (UINT32_MAX): it is a mixture, or cut. */
static uint32_t found(struct upcall_instance *inst)
{
    static uint32_t words[WORDS];
    int32_t length = up->sidecar_read(inst, words, sizeof words);
    if (length == 0)
        return 0;
    if (length != (int32_t)sizeof words)
        return UINT32_MAX;
    for (uint32_t i = 1; i < WORDS; i++)
        if (words[i] != words[0])
            return UINT32_MAX;
    return words[0];
}

static void *keep(void *arg)
{
    static uint32_t words[WORDS];
    struct diary *d = arg;
    for (uint32_t number = atomic_load(&page->durable) + 1; !atomic_load(&d->stop); number++) {
        for (uint32_t i = 0; i < WORDS; i++)
            words[i] = number;
        if (up->sidecar_write(d->inst, words, sizeof words) || up->sidecar_sync(d->inst))
            atomic_fetch_add(&page->wrong, 1);
        atomic_store(&page->durable, number);
    }
    return NULL;
}

static int32_t diary_open(struct upcall_instance *inst, void **self)
{
    uint32_t durable = atomic_load(&page->durable), now = found(inst);
    /* One sync may have been under way. */
    if (now != durable && now != durable + 1) {
        atomic_fetch_add(&page->wrong, 1);
        up->log(inst, UPCALL_LOG_ERROR, "the sidecar holds what was never synced, or something older");
    }
    if (now != UINT32_MAX)
        atomic_store(&page->durable, now);
    struct diary *d = calloc(1, sizeof *d);
    if (!d)
        return -ENOMEM;
    d->inst = inst;
    *self = d;
    atomic_fetch_add(&page->opened, 1);
    return -pthread_create(&d->thread, NULL, keep, d);
}

static void diary_close(void *self)
{
    struct diary *d = self;
    atomic_store(&d->stop, 1);
    pthread_join(d->thread, NULL);
    free(d);
}

static uint32_t diary_start(void *self, struct upcall_request *req)
{
    (void)self;
    (void)req;
    return UPCALL_PASS;
}

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "diary",
    .version = "1",
    .vendor = "upcall",
    .summary = "Keeps its sidecar, for tests",
    .filter_class = UPCALL_CLASS_ENCRYPTION,
    .flags = UPCALL_FILTER_SIDECAR,
    .ops = UPCALL_OP_BIT(UPCALL_WRITE),
    .load = diary_load,
    .open = diary_open,
    .close = diary_close,
    .start_io = diary_start,
};
