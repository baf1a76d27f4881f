/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Requests of the filter's own: out as ISSUE entries, back as ISSUED submissions.
 *
 * Always true: a request for which issue() gave 0 gets its done() called exactly once,
 * also when the worker dies; one for which it gave an error, never.
 */
#include "host.h"

#include <string.h>

#define NONE UINT16_MAX

void uh_issued_init(struct upcall_instance *inst) {
    for (uint32_t i = 0; i < WIRE_ISSUED_MAX; i++)
        inst->issued[i].next_free = (uint16_t)(i + 1 < WIRE_ISSUED_MAX ? i + 1 : NONE);
    inst->issued_free = 0;
    inst->issued_count = 0;
}

/* The token of a slot: its index, and how often it has been used. */
static uint64_t token_of(const struct upcall_instance *inst, const struct uh_issued *slot) {
    return (uint64_t)slot->generation << 32 | (uint32_t)(slot - inst->issued);
}

static struct uh_issued *take_slot(struct upcall_instance *inst, const struct upcall_issue *io) {
    struct uh_issued *slot = NULL;
    pthread_mutex_lock(&inst->lock);
    if (inst->issued_free != NONE) {
        slot = &inst->issued[inst->issued_free];
        inst->issued_free = slot->next_free;
        inst->issued_count++;
        slot->in_use = true;
        slot->generation++;
        slot->done = io->done;
        slot->arg = io->arg;
    }
    pthread_mutex_unlock(&inst->lock);
    return slot;
}

/* With the lock. */
static void free_slot(struct upcall_instance *inst, struct uh_issued *slot) {
    slot->in_use = false;
    slot->next_free = inst->issued_free;
    inst->issued_free = (uint16_t)(slot - inst->issued);
    inst->issued_count--;
}

/* 0 and where its data is, or the negative errno that filter.h promises. */
static int32_t check(struct upcall_instance *inst, const struct upcall_issue *io, uint64_t *data) {
    *data = WIRE_NO_DATA;
    if (!(inst->host->table.flags & UPCALL_FILTER_ISSUES))
        return -EPERM;
    const struct upcall_disk *disk = uh_disk(inst, io->disk);
    if (!disk)
        return -ENODEV;
    bool moves_data = io->op == UPCALL_READ || io->op == UPCALL_WRITE;
    uint16_t flags = io->op == UPCALL_WRITE          ? UPCALL_REQ_FUA
                     : io->op == UPCALL_WRITE_ZEROES ? UPCALL_REQ_UNMAP
                                                     : 0;
    if (io->op < UPCALL_READ || io->op > UPCALL_WRITE_ZEROES || (io->flags & ~flags) || !io->done ||
        (moves_data ? !io->data : io->data != NULL))
        return -EINVAL;
    if (io->op == UPCALL_FLUSH)
        return io->offset == 0 && io->length == 0 ? 0 : -EINVAL;
    uint64_t mask = disk->block_size - 1;
    if (io->length == 0 || io->length > (moves_data ? WIRE_DATA_LENGTH_MAX : WIRE_LENGTH_MAX) ||
        ((io->offset | io->length) & mask) || io->offset > disk->capacity ||
        io->length > disk->capacity - io->offset)
        return -EINVAL;
    if (moves_data) {
        *data = uh_buffer_offset(inst, io->data, io->length);
        if (*data == WIRE_NO_DATA)
            return -EINVAL;
    }
    return 0;
}

/* This thread's channel if it serves the instance's disk, else one after the other of those. */
static struct uh_channel *choose_channel(struct upcall_instance *inst) {
    struct uh_channel *current = uh_current_channel;
    if (current && current->host == inst->host && current->disk == inst->arena)
        return current;
    uint32_t count = atomic_load_explicit(&inst->host->channel_count, memory_order_acquire);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = atomic_fetch_add_explicit(&inst->next_channel, 1, memory_order_relaxed);
        struct uh_channel *channel =
            atomic_load_explicit(&inst->host->channels[at % count], memory_order_acquire);
        if (channel && channel->disk == inst->arena)
            return channel;
    }
    /* Others may have moved the counter past ours each time. */
    for (uint32_t i = 0; i < count; i++) {
        struct uh_channel *channel =
            atomic_load_explicit(&inst->host->channels[i], memory_order_acquire);
        if (channel && channel->disk == inst->arena)
            return channel;
    }
    return NULL;
}

static void put_late(struct uh_job *job) {
    struct uh_issued *slot = (struct uh_issued *)((char *)job - offsetof(struct uh_issued, late_job));
    if (uh_channel_reserve(slot->channel, false))
        uh_channel_commit(slot->channel, &slot->late);
}

/* False: it cannot be sent, now or ever. */
static bool put_issue(struct upcall_host *host, struct uh_issued *slot) {
    bool must_not_wait = uh_channel_is_ours(slot->channel);
    if (uh_channel_reserve(slot->channel, must_not_wait)) {
        uh_channel_commit(slot->channel, &slot->late);
        return true;
    }
    if (!must_not_wait)
        return false;
    slot->late_job = (struct uh_job){ .run = put_late };
    return uh_pool_put(host, &slot->late_job) == 0;
}

int32_t uh_issue(struct upcall_instance *inst, const struct upcall_issue *given) {
    struct upcall_issue io = { 0 };
    if (!given || given->size < offsetof(struct upcall_issue, arg) + sizeof(given->arg))
        return -EINVAL;
    memcpy(&io, given, given->size < sizeof(io) ? given->size : sizeof(io));
    uint64_t data;
    int32_t error = check(inst, &io, &data);
    if (error)
        return error;
    uint32_t state = atomic_load_explicit(&inst->state, memory_order_acquire);
    struct uh_channel *channel = choose_channel(inst);
    if ((state != UH_INSTANCE_OPENING && state != UH_INSTANCE_OPEN) || !channel ||
        atomic_load_explicit(&inst->host->stopping, memory_order_relaxed))
        return -ESHUTDOWN;
    struct uh_issued *slot = take_slot(inst, &io);
    if (!slot)
        return -EAGAIN;
    slot->channel = channel;
    slot->late = (struct wire_completion){
        .kind = WIRE_ISSUE, .code = io.op, .flags = io.flags, .token = token_of(inst, slot),
        .offset = io.offset, .length = io.length, .data = data, .instance = inst->number,
        .disk = io.disk,
    };
    if (put_issue(inst->host, slot))
        return 0;
    pthread_mutex_lock(&inst->lock);
    free_slot(inst, slot);
    pthread_mutex_unlock(&inst->lock);
    return atomic_load(&inst->host->stopping) ? -ESHUTDOWN : -EAGAIN;
}

/* On a channel's thread: the worker says that an issued request has ended. */
void uh_issued(struct upcall_instance *inst, const struct wire_submission *in) {
    uint32_t index = (uint32_t)in->token;
    struct uh_issued ended = { 0 };
    pthread_mutex_lock(&inst->lock);
    if (index < WIRE_ISSUED_MAX && inst->issued[index].in_use &&
        token_of(inst, &inst->issued[index]) == in->token) {
        ended.done = inst->issued[index].done;
        ended.arg = inst->issued[index].arg;
        free_slot(inst, &inst->issued[index]);
    }
    pthread_mutex_unlock(&inst->lock);
    if (ended.done)
        ended.done(ended.arg, in->status);
    else
        uh_logf(inst->host, inst, UPCALL_LOG_ERROR, "the worker ended a request that was not issued");
}

bool uh_issued_any(struct upcall_instance *inst) {
    pthread_mutex_lock(&inst->lock);
    bool any = inst->issued_count != 0;
    pthread_mutex_unlock(&inst->lock);
    return any;
}

/* The worker is gone and will end none of them. */
void uh_issued_abandon(struct upcall_instance *inst) {
    for (uint32_t i = 0; i < WIRE_ISSUED_MAX; i++) {
        pthread_mutex_lock(&inst->lock);
        struct wire_submission in = { .token = token_of(inst, &inst->issued[i]),
                                      .status = -ESHUTDOWN };
        bool in_use = inst->issued[i].in_use;
        pthread_mutex_unlock(&inst->lock);
        if (in_use)
            uh_issued(inst, &in);
    }
}
