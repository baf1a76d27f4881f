/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The filter host's executable: control socket at descriptor 3, the filter's shared
 * object at descriptor 4. Takes no notice of arguments and environment.
 *
 * It ends when the worker says QUIT, closes the socket or dies. Signals that a
 * terminal or a service manager sends to a whole group are ignored: the worker
 * gets them too, drains its disks through us, and then ends us.
 */
#include "host.h"

#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Enough that queue threads rarely meet in malloc. */
#define MALLOC_ARENAS 8

/* As bounds.rs has it. */
#define STACK_BYTES (8u << 20)

/*
 * The one bound that our parent cannot set: the kernel keeps the limit of stacks from before
 * exec and puts it back at the end of it, when the parent goes on already. The C library has
 * taken it for the stacks of threads by now.
 */
static void bound_stacks(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_STACK, &limit) == 0) {
        if (limit.rlim_max > STACK_BYTES)
            limit.rlim_max = STACK_BYTES;
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_STACK, &limit);
    }
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0)
        return;
    if (pthread_attr_setstacksize(&attributes, STACK_BYTES) == 0)
        pthread_setattr_default_np(&attributes);
    pthread_attr_destroy(&attributes);
}

int main(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_NAME, "upcall-filter");
    const int ignored[] = { SIGPIPE, SIGINT, SIGTERM, SIGHUP };
    for (size_t i = 0; i < sizeof(ignored) / sizeof(*ignored); i++)
        signal(ignored[i], SIG_IGN);

    /* Said here, malloc need not read the number of processors from /sys once there are threads. */
    mallopt(M_ARENA_MAX, MALLOC_ARENAS);

    /* What our parent was started with and did not mean for us. Nothing is open yet but those. */
    if (syscall(SYS_close_range, WIRE_FILTER_FD + 1, ~0u, 0u) != 0) {
        perror("upcall-filterhost: cannot close descriptors that it was not given (Linux 5.9?)");
        return 1;
    }
    bound_stacks();

    int type = 0;
    socklen_t length = sizeof(type);
    if (getsockopt(WIRE_SOCKET_FD, SOL_SOCKET, SO_TYPE, &type, &length) != 0 ||
        type != SOCK_SEQPACKET || fcntl(WIRE_FILTER_FD, F_GETFD) < 0) {
        fputs("upcall-filterhost is started by an Upcall worker, not by hand: it needs a "
              "control socket as descriptor 3 and a filter as descriptor 4\n", stderr);
        return 2;
    }
    fcntl(WIRE_SOCKET_FD, F_SETFD, FD_CLOEXEC);
    fcntl(WIRE_FILTER_FD, F_SETFD, FD_CLOEXEC);

#ifndef UPCALL_HOST_UNCONFINED /* sanitizers start processes */
    int error = uh_confine();
    if (error) {
        fprintf(stderr, "upcall-filterhost: this kernel does not let it confine itself (%s); it "
                "needs seccomp filters (CONFIG_SECCOMP_FILTER)\n", strerror(-error));
        return 1;
    }
#endif

    struct upcall_host *host = upcall_host_new(WIRE_SOCKET_FD, WIRE_FILTER_FD, NULL, 0);
    if (!host)
        return 1;
    int result = upcall_host_run(host);
    upcall_host_free(host);
    return result == 0 ? 0 : 1;
}
