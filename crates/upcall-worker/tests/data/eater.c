/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter that eats what the machine has, as the parameter `mode` says. It fails the request
 * with the errno that stops it. Where nothing does, it stops at a multiple of its bound and
 * passes the request, so that a test sees that the bound is gone, and the machine does not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include <upcall/filter.h>

#define MEMORY_MAX (256u << 20)
#define DESCRIPTORS_MAX 4000
#define THREADS_MAX 300

static const struct upcall_services *up;

struct eater {
    struct upcall_instance *inst;
    const char *mode;
};

static int is(const struct eater *e, const char *mode) { return strcmp(e->mode, mode) == 0; }

static int32_t eater_load(const struct upcall_services *services)
{
    up = services;
    return 0;
}

static int32_t eater_open(struct upcall_instance *inst, void **self)
{
    struct eater *e = calloc(1, sizeof *e);
    if (!e)
        return -ENOMEM;
    e->inst = inst;
    e->mode = up->param_string(inst, "mode");
    *self = e;
    return 0;
}

static void eater_close(void *self) { free(self); }

static int eat_memory(void)
{
    const size_t bite = 1 << 20;
    for (size_t eaten = 0; eaten < MEMORY_MAX; eaten += bite) {
        void *memory = malloc(bite);
        if (!memory)
            return errno;
        memset(memory, 0x5a, bite);
    }
    return 0;
}

static int eat_descriptors(void)
{
    for (int i = 0; i < DESCRIPTORS_MAX; i++)
        if (dup(1) < 0)
            return errno;
    return 0;
}

static void *rest(void *arg)
{
    for (;;)
        pause();
    return arg;
}

static int eat_threads(void)
{
    for (int i = 0; i < THREADS_MAX; i++) {
        pthread_t thread;
        int error = pthread_create(&thread, NULL, rest, NULL);
        if (error)
            return error;
    }
    return 0;
}

static void *talk(void *arg)
{
    struct eater *e = arg;
    for (;;)
        up->log(e->inst, UPCALL_LOG_ERROR, "and another thing that nobody wants to know");
    return NULL;
}

static void *spin(void *arg)
{
    for (volatile unsigned long turns = 0;; turns++)
        ;
    return arg;
}

/* Several at once, and they go on when the request is answered. */
static int start(void *(*run)(void *), struct eater *e)
{
    for (int i = 0; i < 4; i++) {
        pthread_t thread;
        int error = pthread_create(&thread, NULL, run, e);
        if (error)
            return error;
    }
    return 0;
}

/* Many, on small stacks. */
static int crowd(void)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    for (int i = 0; i < 24; i++) {
        pthread_t thread;
        int error = pthread_create(&thread, &small, spin, NULL);
        if (error)
            return error;
    }
    return 0;
}

/* Lifts the bound of its descriptors. */
static int raise_bound(void)
{
    struct rlimit more = { DESCRIPTORS_MAX, DESCRIPTORS_MAX };
    if (setrlimit(RLIMIT_NOFILE, &more) == 0 || prlimit(0, RLIMIT_NOFILE, &more, NULL) == 0)
        return 0;
    int error = errno;
    return prlimit(0, RLIMIT_NOFILE, NULL, &more) == 0 ? error : ENOSYS; /* asking is allowed */
}

/* Leaves a process behind that has everything mapped. */
static int leave_child(void)
{
    pid_t child = fork();
    if (child == 0)
        for (;;)
            pause();
    return child < 0 ? errno : 0;
}

static int execute(void)
{
    char *const words[] = { "true", NULL };
    return execv("/bin/true", words) < 0 ? errno : 0;
}

static uint32_t eater_start(void *self, struct upcall_request *req)
{
    struct eater *e = self;
    int error = is(e, "memory")        ? eat_memory()
                : is(e, "descriptors") ? eat_descriptors()
                : is(e, "threads")     ? eat_threads()
                : is(e, "log")         ? start(talk, e)
                : is(e, "spin")        ? start(spin, e)
                : is(e, "crowd")       ? crowd()
                : is(e, "raise")       ? raise_bound()
                : is(e, "fork")        ? leave_child()
                : is(e, "execute")     ? execute()
                                       : 0;
    if (is(e, "spin"))
        spin(e);
    if (is(e, "die") && eat_memory())
        abort();
    req->status = -error;
    return error ? UPCALL_FAIL : UPCALL_PASS;
}

static uint32_t eater_done(void *self, struct upcall_request *req)
{
    (void)self;
    (void)req;
    return UPCALL_PASS;
}

static void eater_cancel(void *self, void *context)
{
    (void)self;
    (void)context;
}

static const struct upcall_param params[] = {
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_STRING, .name = "mode",
      .doc = "What to eat.", .default_value = "nothing", .min = 1, .max = 20 },
};

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "eater",
    .version = "1",
    .vendor = "upcall",
    .summary = "Eats what the machine has, for tests",
    .filter_class = UPCALL_CLASS_INSPECTION,
    .ops = UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE),
    .param_count = 1,
    .params = params,
    .load = eater_load,
    .open = eater_open,
    .close = eater_close,
    .start_io = eater_start,
    .io_done = eater_done,
    .cancel = eater_cancel,
};
