/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Memory for the data of issued requests: whole pages of the issue arena, first fit.
 *
 * Every page knows which instance owns it; only its owner may free or use it, and what
 * an instance still owns when it closes is taken back.
 */
#include "host.h"

#include <string.h>

static uint16_t owner_of(const struct upcall_instance *inst) {
    return (uint16_t)(inst->number + 1);
}

/* The first of @pages free pages in a row, or `buffers->pages`. */
static uint32_t find(const struct uh_buffers *buffers, uint32_t pages) {
    uint32_t run = 0;
    for (uint32_t i = 0; i < buffers->pages; i++) {
        run = buffers->owner[i] ? 0 : run + 1;
        if (run == pages)
            return i + 1 - pages;
    }
    return buffers->pages;
}

static void set_owner(struct uh_buffers *buffers, uint32_t first, uint32_t pages, uint16_t owner) {
    for (uint32_t i = first; i < first + pages; i++)
        buffers->owner[i] = owner;
}

void *uh_buffer_alloc(struct upcall_instance *inst, uint32_t length) {
    struct uh_buffers *buffers = &inst->host->buffers;
    if (length == 0 || length > WIRE_DATA_LENGTH_MAX || !buffers->base)
        return NULL;
    uint32_t pages = (length + UH_PAGE - 1) / UH_PAGE;
    void *data = NULL;
    pthread_mutex_lock(&buffers->lock);
    uint32_t first = find(buffers, pages);
    if (first < buffers->pages) {
        set_owner(buffers, first, pages, owner_of(inst));
        buffers->length[first] = pages;
        data = buffers->base + (size_t)first * UH_PAGE;
    }
    pthread_mutex_unlock(&buffers->lock);
    return data;
}

/* The page at @data; `buffers->pages` if it is outside. */
static uint32_t page_at(const struct uh_buffers *buffers, const void *data) {
    uintptr_t at = (uintptr_t)data, base = (uintptr_t)buffers->base;
    uintptr_t size = (uintptr_t)buffers->pages * UH_PAGE;
    return at >= base && at - base < size ? (uint32_t)((at - base) / UH_PAGE) : buffers->pages;
}

void uh_buffer_free(struct upcall_instance *inst, void *data) {
    struct uh_buffers *buffers = &inst->host->buffers;
    if (!data)
        return;
    pthread_mutex_lock(&buffers->lock);
    uint32_t first = page_at(buffers, data);
    bool ok = first < buffers->pages && (uintptr_t)data % UH_PAGE == 0 && buffers->length[first] &&
              buffers->owner[first] == owner_of(inst);
    if (ok) {
        set_owner(buffers, first, buffers->length[first], 0);
        buffers->length[first] = 0;
    }
    pthread_mutex_unlock(&buffers->lock);
    if (!ok)
        uh_logf(inst->host, inst, UPCALL_LOG_ERROR, "buffer_free() of what is no buffer of this "
                "instance, or was freed before");
}

uint64_t uh_buffer_offset(struct upcall_instance *inst, const void *data, uint32_t length) {
    struct uh_buffers *buffers = &inst->host->buffers;
    uint32_t first = page_at(buffers, data);
    if (!buffers->base || first >= buffers->pages || length == 0)
        return WIRE_NO_DATA;
    uint64_t offset = (uint64_t)((const unsigned char *)data - buffers->base);
    uint64_t last = (offset + length - 1) / UH_PAGE;
    bool ok = last < buffers->pages;
    pthread_mutex_lock(&buffers->lock);
    for (uint64_t page = first; ok && page <= last; page++)
        ok = buffers->owner[page] == owner_of(inst);
    pthread_mutex_unlock(&buffers->lock);
    return ok ? offset : WIRE_NO_DATA;
}

void uh_buffers_reclaim(struct upcall_instance *inst) {
    struct uh_buffers *buffers = &inst->host->buffers;
    pthread_mutex_lock(&buffers->lock);
    for (uint32_t i = 0; i < buffers->pages; i++)
        if (buffers->owner[i] == owner_of(inst))
            buffers->owner[i] = 0, buffers->length[i] = 0;
    pthread_mutex_unlock(&buffers->lock);
}
