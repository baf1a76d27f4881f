/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Instances: one filter on one disk, from OPEN to CLOSE.
 *
 * Always true: open() has returned before the first request of an instance, and close()
 * is called when no request is with the filter, no issued one is in flight and no
 * blocking work is left. CLOSE is answered after that, however long it takes.
 */
#include "host.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

/* How long the filter has to give back its requests when the worker is gone. */
#define ABANDON_NS UINT64_C(1000000000)

struct upcall_instance *uh_instance(struct upcall_host *host, uint32_t number) {
    if (number >= UH_INSTANCES_MAX)
        return NULL;
    return atomic_load_explicit(&host->instances[number], memory_order_acquire);
}

const struct upcall_disk *uh_disk(struct upcall_instance *inst, uint32_t index) {
    return index < inst->disk_count ? &inst->disks[index] : NULL;
}

static bool is_open(const struct upcall_instance *inst) {
    uint32_t state = inst ? atomic_load(&inst->state) : UH_INSTANCE_NONE;
    return state == UH_INSTANCE_OPEN || state == UH_INSTANCE_CLOSING;
}

/* ---- open ---- */

/* The instance of that number, made if it was never used; NULL: out of memory. */
static struct upcall_instance *find_or_make(struct upcall_host *host, uint32_t number) {
    struct upcall_instance *inst = uh_instance(host, number);
    if (inst)
        return inst;
    inst = calloc(1, sizeof(*inst));
    if (!inst)
        return NULL;
    inst->host = host;
    inst->number = number;
    pthread_mutex_init(&inst->lock, NULL);
    uh_sidecar_init(inst);
    uh_extents_init(inst);
    atomic_store_explicit(&host->instances[number], inst, memory_order_release);
    return inst;
}

static int read_disks(struct upcall_host *host, struct upcall_instance *inst, uint32_t count,
                      struct uh_reader *reader) {
    if (count == 0 || count > UH_DISKS_MAX)
        return uh_fail(host, -EINVAL, "OPEN with %u disks; between 1 and %u are possible", count,
                       UH_DISKS_MAX);
    for (uint32_t i = 0; i < count; i++) {
        struct wire_disk disk;
        if (!uh_read(reader, &disk, sizeof(disk)))
            return uh_fail(host, -EINVAL, "OPEN ends within disk %u", i);
        if (disk.block_size < 512 || (disk.block_size & (disk.block_size - 1)))
            return uh_fail(host, -EINVAL, "disk %u has a block size of %u", i, disk.block_size);
        inst->disks[i] = (struct upcall_disk){ .size = sizeof(struct upcall_disk),
                                               .block_size = disk.block_size,
                                               .capacity = disk.capacity,
                                               .read_only = disk.read_only != 0 };
    }
    inst->disk_count = count;
    return 0;
}

static int read_open(struct upcall_host *host, struct upcall_instance *inst,
                     struct uh_message *message) {
    struct uh_reader reader = { message->payload, message->length };
    struct wire_open open;
    uh_read(&reader, &open, sizeof(open)); /* the message's length was checked */
    inst->arena = open.arena;
    if (open.arena < UH_ARENAS_MAX) {
        inst->arena_base = host->arenas[open.arena].base;
        inst->arena_size = host->arenas[open.arena].size;
    }
    bool has_sidecar = open.files & WIRE_OPEN_SIDECAR, has_extents = open.files & WIRE_OPEN_EXTENTS;
    uint32_t files_from = 1 + has_sidecar + has_extents;
    if ((open.files & ~(WIRE_OPEN_SIDECAR | WIRE_OPEN_EXTENTS)) || message->fd_count < files_from)
        return uh_fail(host, -EINVAL, "OPEN says files %#x and brings %u descriptors",
                       open.files, message->fd_count);
    int error = read_disks(host, inst, open.disks, &reader);
    if (!error)
        error = uh_params_read(host, inst, open.parameters, &reader, message->fds + files_from,
                               message->fd_count - files_from);
    if (!error && reader.left)
        error = uh_fail(host, -EINVAL, "OPEN has %zu bytes too many", reader.left);
    if (error)
        return error;
    inst->counters = uh_map(message->fds[0], WIRE_COUNTERS_SIZE, true);
    if (!inst->counters)
        return uh_fail(host, -errno, "cannot map the counters: %s", strerror(errno));
    if (has_sidecar) {
        if (uh_sidecar_open(inst, message->fds[1]) != 0)
            return uh_fail(host, -ENOMEM, "out of memory");
        message->fds[1] = -1;
    }
    if (has_extents) {
        if (uh_extents_open(inst, message->fds[files_from - 1]) != 0)
            return uh_fail(host, -ENOMEM, "out of memory");
        message->fds[files_from - 1] = -1;
    }
    return 0;
}

/* Gives back what an instance has, whether it was opened or not. */
static void release(struct upcall_instance *inst) {
    uint32_t left = uh_timers_reclaim(inst);
    if (left)
        uh_logf(inst->host, inst, UPCALL_LOG_WARN, "close() left %u timers and watches", left);
    uh_buffers_reclaim(inst);
    uh_params_free(inst);
    uh_sidecar_close(inst);
    uh_extents_close(inst);
    atomic_store(&inst->counter_count, 0);
    if (inst->counters)
        munmap(inst->counters, WIRE_COUNTERS_SIZE);
    inst->counters = NULL;
    inst->self = NULL;
    inst->arena_base = NULL;
    inst->arena_size = 0;
    inst->disk_count = 0;
}

int uh_instance_open(struct upcall_host *host, struct uh_message *message) {
    uint32_t number = message->header.id;
    if (!host->loaded)
        return uh_fail(host, -EPROTO, "OPEN before LOAD");
    if (number >= UH_INSTANCES_MAX || is_open(uh_instance(host, number)))
        return uh_fail(host, -EEXIST, "instance %u is open already, or the number is not below %u",
                       number, UH_INSTANCES_MAX);
    struct upcall_instance *inst = find_or_make(host, number);
    if (!inst)
        return uh_fail(host, -ENOMEM, "out of memory");
    uh_issued_init(inst);
    int error = read_open(host, inst, message);
    if (!error && host->table.open) {
        atomic_store(&inst->state, UH_INSTANCE_OPENING);
        error = host->table.open(inst, &inst->self);
        if (error)
            error = uh_fail(host, error < 0 ? error : -EINVAL, "open() of filter %s gave %d (%s)",
                            host->table.name, error, strerror(error < 0 ? -error : EINVAL));
    }
    if (error) {
        atomic_store(&inst->state, UH_INSTANCE_CLOSED);
        release(inst);
        return error;
    }
    atomic_store_explicit(&inst->state, UH_INSTANCE_OPEN, memory_order_release);
    uh_point(UH_POINT_OPENED, 0, 0);
    return 0;
}

/* ---- event, close ---- */

int uh_instance_event(struct upcall_host *host, struct uh_message *message) {
    struct upcall_instance *inst = uh_instance(host, message->header.id);
    uint32_t event;
    memcpy(&event, message->payload, sizeof(event));
    if (!is_open(inst))
        return uh_fail(host, -ENOENT, "there is no instance %u", message->header.id);
    int error = host->table.event ? host->table.event(inst->self, event) : 0;
    if (error)
        return uh_fail(host, error < 0 ? error : -EINVAL, "event() of filter %s gave %d (%s)",
                       host->table.name, error, strerror(error < 0 ? -error : EINVAL));
    return 0;
}

/* ---- state ---- */

int uh_instance_save(struct upcall_host *host, struct uh_message *message) {
    struct upcall_instance *inst = uh_instance(host, message->header.id);
    if (!is_open(inst))
        return uh_fail(host, -ENOENT, "there is no instance %u", message->header.id);
    if (!host->table.save_state)
        return uh_fail(host, -ENOTSUP, "filter %s has no save_state()", host->table.name);
    void *state = uh_map(message->fds[0], UPCALL_STATE_MAX, true);
    if (!state)
        return uh_fail(host, -errno, "cannot map the memory for a state: %s", strerror(errno));
    int length = host->table.save_state(inst->self, state, UPCALL_STATE_MAX);
    munmap(state, UPCALL_STATE_MAX);
    if (length < 0 || (uint32_t)length > UPCALL_STATE_MAX)
        return uh_fail(host, length < 0 ? length : -EMSGSIZE, "save_state() of filter %s gave %d (%s)",
                       host->table.name, length, strerror(length < 0 ? -length : EMSGSIZE));
    return length;
}

int uh_instance_load(struct upcall_host *host, struct uh_message *message) {
    struct upcall_instance *inst = uh_instance(host, message->header.id);
    uint32_t length = message->header.value;
    if (!is_open(inst))
        return uh_fail(host, -ENOENT, "there is no instance %u", message->header.id);
    if (!host->table.load_state || length > UPCALL_STATE_MAX)
        return uh_fail(host, -ENOTSUP, "filter %s takes over no state of %u bytes",
                       host->table.name, length);
    void *state = uh_map(message->fds[0], UPCALL_STATE_MAX, false);
    if (!state)
        return uh_fail(host, -errno, "cannot map a state: %s", strerror(errno));
    int error = host->table.load_state(inst->self, state, length);
    munmap(state, UPCALL_STATE_MAX);
    if (error)
        return uh_fail(host, error < 0 ? error : -EINVAL, "load_state() of filter %s gave %d (%s)",
                       host->table.name, error, strerror(error < 0 ? -error : EINVAL));
    return 0;
}

/* Closed, and no callback will come any more, if the filter has nothing of this instance left. */
static bool try_to_close(struct upcall_host *host, struct upcall_instance *inst) {
    uh_channels_lock(host);
    bool closed = !uh_requests_with(host, inst) && !uh_issued_any(inst) && uh_pool_close(inst);
    uh_channels_unlock(host);
    return closed;
}

static void finish(struct upcall_host *host, struct upcall_instance *inst) {
    if (host->table.close)
        host->table.close(inst->self);
    release(inst);
}

int uh_instance_close(struct upcall_host *host, struct uh_message *message) {
    struct upcall_instance *inst = uh_instance(host, message->header.id);
    if (!is_open(inst))
        return uh_fail(host, -ENOENT, "there is no instance %u", message->header.id);
    atomic_store(&inst->state, UH_INSTANCE_CLOSING);
    while (!try_to_close(host, inst))
        if (uh_control_hung_up(host, 1))
            return uh_fail(host, -ECANCELED, "the worker has gone");
    uh_point(UH_POINT_CLOSING, 0, 0);
    finish(host, inst);
    uh_point(UH_POINT_CLOSED, 0, 0);
    return 0;
}

/* ---- the end ---- */

static bool close_abandoned(struct upcall_host *host, struct upcall_instance *inst, uint64_t end) {
    atomic_store(&inst->state, UH_INSTANCE_CLOSING);
    uh_issued_abandon(inst);
    uh_requests_cancel(host, inst);
    while (!try_to_close(host, inst)) {
        if (uh_now_ns() > end)
            return false;
        nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
    }
    finish(host, inst);
    return true;
}

int uh_instances_abandon(struct upcall_host *host) {
    uint64_t end = uh_now_ns() + ABANDON_NS;
    int error = 0;
    for (uint32_t i = 0; i < UH_INSTANCES_MAX; i++) {
        struct upcall_instance *inst = uh_instance(host, i);
        if (is_open(inst) && !close_abandoned(host, inst, end))
            error = -EBUSY;
    }
    return error;
}

void uh_instances_free(struct upcall_host *host) {
    for (uint32_t i = 0; i < UH_INSTANCES_MAX; i++) {
        struct upcall_instance *inst = uh_instance(host, i);
        if (!inst)
            continue;
        pthread_mutex_destroy(&inst->lock);
        uh_sidecar_free(inst);
        uh_extents_free(inst);
        free(inst);
    }
}
