/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter that eats what the machine has, as the parameter `mode` says. It fails the request
 * with the errno that stops it. Where nothing does, it stops at a multiple of its bound and
 * passes the request, so that a test sees that the bound is gone, and the machine does not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
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

/*
 * Calls by their numbers, past what the C library makes of them. 0 if one is let through that
 * should not be, else the errno of the last.
 */
#define REFUSED(result) do { if ((result) >= 0) return 0; } while (0)

/* Sets the bound of its descriptors: higher, or to what it is. */
static int raise_bound(void)
{
    struct rlimit now, more = { DESCRIPTORS_MAX, DESCRIPTORS_MAX };
    if (prlimit(0, RLIMIT_NOFILE, NULL, &now) != 0)
        return ENOSYS; /* asking is allowed */
    REFUSED(syscall(SYS_setrlimit, RLIMIT_NOFILE, &now));
    REFUSED(prlimit(0, RLIMIT_NOFILE, &now, NULL));
    REFUSED(syscall(SYS_setrlimit, RLIMIT_NOFILE, &more));
    REFUSED(prlimit(0, RLIMIT_NOFILE, &more, NULL));
    return errno;
}

/* Leaves a process behind that has everything mapped. */
static int leave_child(void)
{
    if (syscall(SYS_clone3, NULL, 0) >= 0 || errno != ENOSYS)
        return 0; /* then the C library does not fall back on clone() */
    long child = syscall(SYS_clone, 17L /* SIGCHLD */, 0L, 0L, 0L, 0L);
    if (child == 0)
        _exit(0);
    REFUSED(child);
    child = syscall(SYS_fork);
    if (child == 0)
        _exit(0);
    REFUSED(child);
    child = vfork();
    if (child == 0)
        _exit(0);
    REFUSED(child);
    return errno;
}

static int execute(void)
{
    char *const words[] = { "true", NULL };
    REFUSED(execve("/bin/true", words, environ));
    REFUSED(syscall(SYS_execveat, AT_FDCWD, "/bin/true", words, environ, 0));
    return errno;
}

/* Reaches into other processes, or out of the group by which it is weighed. */
static int reach_out(void)
{
    char byte = 0;
    struct iovec mine = { &byte, 1 };
    REFUSED(setpgid(0, getpgid(getppid())));
    REFUSED(setsid());
    REFUSED(syscall(SYS_ptrace, 0L /* PTRACE_TRACEME */, 0L, 0L, 0L));
    REFUSED(process_vm_writev(getpid(), &mine, 1, &mine, 1, 0));
    return errno;
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
                : is(e, "reach")       ? reach_out()
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
