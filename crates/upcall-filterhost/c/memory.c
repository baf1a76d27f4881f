/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The memory that the worker shares: arenas, the issue arena, channels.
 *
 * Nothing is mapped that the file is too short for, and an arena that is not said to be
 * writable is mapped read-only: a filter that writes there faults.
 */
#include "host.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

void *uh_map(int fd, uint64_t size, bool writable) {
    struct stat stat;
    if (fstat(fd, &stat) != 0)
        return NULL;
    if (size == 0 || stat.st_size < 0 || (uint64_t)stat.st_size < size) {
        errno = EINVAL;
        return NULL;
    }
    if (size > SIZE_MAX / 2) {
        errno = ENOMEM;
        return NULL;
    }
    int protection = PROT_READ | (writable ? PROT_WRITE : 0);
    void *base = mmap(NULL, (size_t)size, protection, MAP_SHARED, fd, 0);
    return base == MAP_FAILED ? NULL : base;
}

int uh_memory_arena(struct upcall_host *host, struct uh_message *message) {
    struct wire_arena arena;
    memcpy(&arena, message->payload, sizeof(arena));
    uint32_t disk = message->header.id;
    if (disk >= UH_ARENAS_MAX || host->arenas[disk].base)
        return uh_fail(host, -EEXIST, "the arena of disk %u is there already, or the number is not "
                       "below %u", disk, UH_ARENAS_MAX);
    void *base = uh_map(message->fds[0], arena.size, arena.writable != 0);
    if (!base)
        return uh_fail(host, -errno, "cannot map the arena of disk %u, %llu bytes, into %zu bits: "
                       "%s", disk, (unsigned long long)arena.size, 8 * sizeof(void *),
                       strerror(errno));
    host->arenas[disk] = (struct uh_arena){ base, arena.size };
    uh_point(UH_POINT_ARENA, 0, 0);
    return 0;
}

int uh_memory_issue_arena(struct upcall_host *host, struct uh_message *message) {
    struct uh_buffers *buffers = &host->buffers;
    uint64_t size;
    memcpy(&size, message->payload, sizeof(size));
    if (buffers->base)
        return uh_fail(host, -EEXIST, "the issue arena is there already");
    if (size == 0 || size % UH_PAGE || size / UH_PAGE > 1u << 20)
        return uh_fail(host, -EINVAL, "an issue arena of %llu bytes", (unsigned long long)size);
    uint32_t pages = (uint32_t)(size / UH_PAGE);
    uint16_t *owner = calloc(pages, sizeof(*owner));
    uint32_t *length = calloc(pages, sizeof(*length));
    void *base = owner && length ? uh_map(message->fds[0], size, true) : NULL;
    if (!base) {
        int error = errno;
        free(owner);
        free(length);
        return uh_fail(host, -error, "cannot map the issue arena, %llu bytes: %s",
                       (unsigned long long)size, strerror(error));
    }
    buffers->owner = owner;
    buffers->length = length;
    buffers->pages = pages;
    buffers->base = base;
    return 0;
}

/* The number of entries of the ring at @fd, after checking what stands before it; 0: none. */
static uint32_t channel_entries(int fd) {
    unsigned char *page = uh_map(fd, WIRE_RINGS_OFFSET, false);
    if (!page)
        return 0;
    uint64_t magic;
    uint32_t version, entries;
    memcpy(&magic, page, sizeof(magic));
    memcpy(&version, page + 8, sizeof(version));
    memcpy(&entries, page + WIRE_ENTRIES_OFFSET, sizeof(entries));
    munmap(page, WIRE_RINGS_OFFSET);
    bool ok = magic == WIRE_MAGIC && version == WIRE_VERSION && entries != 0 &&
              entries <= WIRE_ENTRIES_MAX && (entries & (entries - 1)) == 0;
    return ok ? entries : 0;
}

int uh_memory_channel(struct upcall_host *host, struct uh_message *message) {
    uint32_t number = message->header.id;
    if (number >= UH_CHANNELS_MAX || atomic_load(&host->channels[number]))
        return uh_fail(host, -EEXIST, "channel %u is there already, or the number is not below %u",
                       number, UH_CHANNELS_MAX);
    uint32_t entries = channel_entries(message->fds[0]);
    if (entries == 0)
        return uh_fail(host, -EINVAL, "the memory of channel %u is no ring of version %u", number,
                       WIRE_VERSION);
    size_t size = WIRE_RINGS_OFFSET + 2u * WIRE_ENTRY_SIZE * (size_t)entries;
    void *base = uh_map(message->fds[0], size, true);
    if (!base)
        return uh_fail(host, -errno, "cannot map channel %u, %zu bytes: %s", number, size,
                       strerror(errno));
    struct uh_channel *channel = aligned_alloc(64, sizeof(*channel));
    if (!channel) {
        munmap(base, size);
        return uh_fail(host, -ENOMEM, "out of memory");
    }
    memset(channel, 0, sizeof(*channel));
    channel->host = host;
    channel->disk = message->header.value;
    channel->doorbell = message->fds[1];
    channel->worker_doorbell = message->fds[2];
    message->fds[1] = message->fds[2] = -1;
    channel->base = base;
    channel->size = size;
    channel->entries = entries;
    channel->submissions = (void *)(channel->base + WIRE_RINGS_OFFSET);
    channel->completions = (void *)(channel->base + WIRE_RINGS_OFFSET +
                                    (size_t)entries * WIRE_ENTRY_SIZE);
    pthread_mutex_init(&channel->serve, NULL);
    pthread_mutex_init(&channel->out, NULL);
    atomic_store_explicit(&host->channels[number], channel, memory_order_release);
    if (number >= host->channel_count)
        atomic_store_explicit(&host->channel_count, number + 1, memory_order_release);
    uh_point(UH_POINT_CHANNEL, 0, 0);
    return 0;
}

static void free_channel(struct uh_channel *channel) {
    uh_requests_free(channel);
    munmap(channel->base, channel->size);
    close(channel->doorbell);
    close(channel->worker_doorbell);
    pthread_mutex_destroy(&channel->serve);
    pthread_mutex_destroy(&channel->out);
    free(channel);
}

void uh_memory_free(struct upcall_host *host) {
    for (uint32_t i = 0; i < UH_CHANNELS_MAX; i++)
        if (host->channels[i])
            free_channel(host->channels[i]);
    for (uint32_t i = 0; i < UH_ARENAS_MAX; i++)
        if (host->arenas[i].base)
            munmap(host->arenas[i].base, (size_t)host->arenas[i].size);
    if (host->buffers.base)
        munmap(host->buffers.base, (size_t)host->buffers.pages * UH_PAGE);
    free(host->buffers.owner);
    free(host->buffers.length);
}
