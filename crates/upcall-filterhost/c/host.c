/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The whole of a filter host: its beginning, its end, and the services a filter gets.
 * See inline.h for the contracts and host.h for the parts.
 */
#include "host.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct upcall_services services = {
    .size = sizeof(struct upcall_services),
    .abi_version = UPCALL_ABI_VERSION,
    .answer = uh_answer,
    .issue = uh_issue,
    .buffer_alloc = uh_buffer_alloc,
    .buffer_free = uh_buffer_free,
    .disk = uh_disk,
    .param_int = uh_param_int,
    .param_string = uh_param_string,
    .param_fd = uh_param_fd,
    .timer_start = uh_timer_start,
    .timer_stop = uh_timer_stop,
    .watch_start = uh_watch_start,
    .watch_stop = uh_watch_stop,
    .run_blocking = uh_run_blocking,
    .counter = uh_counter,
    .counter_add = uh_counter_add,
    .log = uh_log,
    .sidecar_read = uh_sidecar_read,
    .sidecar_write = uh_sidecar_write,
    .sidecar_sync = uh_sidecar_sync,
    .extents = uh_extents,
};

struct upcall_host *upcall_host_new(int control_fd, int filter_fd, const char *filter_path,
                                    int inline_mode) {
    struct upcall_host *host = calloc(1, sizeof(*host));
    char *path = filter_path ? strdup(filter_path) : NULL;
    if (!host || (filter_path && !path) || uh_timers_init(&host->timers) != 0) {
        free(host);
        free(path);
        close(control_fd);
        if (filter_fd >= 0)
            close(filter_fd);
        return NULL;
    }
    host->control_fd = control_fd;
    host->filter_fd = filter_fd;
    host->filter_path = path;
    host->inline_mode = inline_mode != 0;
    host->services = services;
    pthread_mutex_init(&host->buffers.lock, NULL);
    pthread_mutex_init(&host->log.lock, NULL);
    uh_pool_init(&host->pool);
    return host;
}

/*
 * Order matters: first no more deliveries, then no more instances, then no more threads
 * of ours in the filter's code, then unload.
 */
static int end(struct upcall_host *host) {
    uh_channels_stop(host);
    if (uh_instances_abandon(host) != 0) {
        host->abandoned = true;
        return -EBUSY;
    }
    uh_timers_end(host);
    uh_pool_end(host);
    if (host->loaded && host->table.unload)
        host->table.unload();
    host->loaded = false;
    uh_library_close(host);
    return 0;
}

/* Seconds that an orderly end may take, in a process of our own, before it ends anyway. */
#define END_SECONDS 10

int upcall_host_run(struct upcall_host *host) {
    struct upcall_host *before = uh_current_host;
    uh_current_host = host;
    uh_control_serve(host);
    if (!host->inline_mode)
        alarm(END_SECONDS);
    int result = end(host);
    uh_current_host = before;
    return result;
}

void upcall_host_free(struct upcall_host *host) {
    if (!host || host->abandoned)
        return;
    uh_timers_end(host);
    uh_pool_end(host);
    uh_library_close(host);
    uh_instances_free(host);
    uh_memory_free(host);
    close(host->timers.wake);
    close(host->control_fd);
    if (host->filter_fd >= 0)
        close(host->filter_fd);
    free(host->filter_path);
    free(host);
}

int upcall_host_deliver(struct upcall_host *host, uint32_t number,
                        const struct wire_submission *in, struct wire_completion *out) {
    if (number >= UH_CHANNELS_MAX)
        return -1;
    struct uh_channel *channel =
        atomic_load_explicit(&host->channels[number], memory_order_acquire);
    if (!channel)
        return -1;
    struct upcall_host *host_before = uh_current_host;
    struct uh_channel *channel_before = uh_current_channel;
    uh_current_host = host;
    uh_current_channel = channel;
    pthread_mutex_lock(&channel->serve);
    int result = uh_deliver(channel, in, out);
    channel->bell_due = false; /* the caller is who would be woken */
    pthread_mutex_unlock(&channel->serve);
    uh_current_host = host_before;
    uh_current_channel = channel_before;
    return result;
}
