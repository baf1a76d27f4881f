/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What a disk consists of, asked of the worker over a socket of the instance's own, on
 * whose other end a thread of the worker may block for the store.
 *
 * Always true: what is given to the filter lies within the range that it asked for, in whole
 * blocks; an answer that is late, wrong or missing counts as data.
 */
#include "host.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* How long the worker may look; the store has bounds of its own. */
#define PATIENCE_NS UINT64_C(6000000000)
#define ANSWER_MAX (sizeof(struct wire_extents_answer) + \
                    UPCALL_EXTENTS_MAX * sizeof(struct upcall_extent))

void uh_extents_init(struct upcall_instance *inst) {
    pthread_mutex_init(&inst->extents.lock, NULL);
    inst->extents.fd = -1;
}

int uh_extents_open(struct upcall_instance *inst, int fd) {
    inst->extents.answer = malloc(ANSWER_MAX);
    if (!inst->extents.answer)
        return -ENOMEM;
    inst->extents.fd = fd;
    return 0;
}

void uh_extents_close(struct upcall_instance *inst) {
    if (inst->extents.fd >= 0)
        close(inst->extents.fd);
    free(inst->extents.answer);
    inst->extents.fd = -1;
    inst->extents.answer = NULL;
}

void uh_extents_free(struct upcall_instance *inst) {
    uh_extents_close(inst);
    pthread_mutex_destroy(&inst->extents.lock);
}

/* Bytes of the answer to the last question; 0: there is none. */
static size_t receive(struct uh_extents *extents) {
    uint64_t end = uh_now_ns() + PATIENCE_NS;
    for (uint64_t now; (now = uh_now_ns()) < end;) {
        struct pollfd ready = { .fd = extents->fd, .events = POLLIN };
        if (poll(&ready, 1, (int)((end - now) / 1000000 + 1)) <= 0)
            continue;
        ssize_t length = recv(extents->fd, extents->answer, ANSWER_MAX, MSG_DONTWAIT);
        if (length < 0 && (errno == EAGAIN || errno == EINTR))
            continue;
        struct wire_extents_answer head;
        if (length < (ssize_t)sizeof(head))
            return 0;
        memcpy(&head, extents->answer, sizeof(head));
        if (head.number == extents->number) /* else of one that nobody waits for any more */
            return (size_t)length;
    }
    return 0;
}

/* How many extents the answer has, if all of them are as they should be; else 0. */
static uint32_t take(const struct uh_extents *extents, size_t have, uint64_t length,
                     uint64_t block_size, struct upcall_extent *entries, uint32_t max) {
    struct wire_extents_answer head;
    if (have < sizeof(head))
        return 0;
    memcpy(&head, extents->answer, sizeof(head));
    if (head.count > max || have != sizeof(head) + head.count * sizeof(*entries))
        return 0;
    for (uint32_t i = 0; i < head.count; i++) {
        struct upcall_extent extent;
        memcpy(&extent, extents->answer + sizeof(head) + i * sizeof(extent), sizeof(extent));
        if (extent.length == 0 || extent.length > length || (extent.length & (block_size - 1)) ||
            extent.kind > UPCALL_EXTENT_HOLE)
            return 0;
        length -= extent.length;
        entries[i] = (struct upcall_extent){ .length = extent.length, .kind = extent.kind };
    }
    return head.count;
}

/* With the lock. */
static uint32_t ask(struct uh_extents *extents, struct wire_extents_question *question,
                    uint64_t block_size, struct upcall_extent *entries) {
    if (extents->fd < 0)
        return 0;
    question->number = ++extents->number;
    ssize_t sent;
    do {
        sent = send(extents->fd, question, sizeof(*question), MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent != (ssize_t)sizeof(*question))
        return 0;
    return take(extents, receive(extents), question->length, block_size, entries, question->max);
}

int32_t uh_extents(struct upcall_instance *inst, uint32_t disk, uint64_t offset, uint64_t length,
                   struct upcall_extent *entries, uint32_t max) {
    if (!(inst->host->table.flags & UPCALL_FILTER_EXTENTS))
        return -EPERM;
    if (uh_current_channel)
        return -EDEADLK;
    const struct upcall_disk *of = uh_disk(inst, disk);
    if (!of)
        return -ENODEV;
    if (!entries || max == 0 || length == 0 || ((offset | length) & (of->block_size - 1)) ||
        offset > of->capacity || length > of->capacity - offset)
        return -EINVAL;
    struct wire_extents_question question = {
        .offset = offset, .length = length, .disk = disk,
        .max = max < UPCALL_EXTENTS_MAX ? max : UPCALL_EXTENTS_MAX };
    pthread_mutex_lock(&inst->extents.lock);
    uint32_t count = ask(&inst->extents, &question, of->block_size, entries);
    pthread_mutex_unlock(&inst->extents.lock);
    if (count)
        return (int32_t)count;
    entries[0] = (struct upcall_extent){ .length = length, .kind = UPCALL_EXTENT_DATA };
    return 1;
}
