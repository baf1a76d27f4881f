/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Counters: names and values in a page that the worker shows to people.
 *
 * A name is complete before its entry's first byte becomes visible: readers in other
 * processes see an empty name or the whole of it.
 */
#include "host.h"

#include <string.h>

static int32_t find(const struct upcall_instance *inst, const char *name) {
    for (uint32_t i = 0; i < inst->counter_count; i++)
        if (strncmp(inst->counters[i].name, name, WIRE_COUNTER_NAME_SIZE) == 0)
            return (int32_t)i;
    return -1;
}

static int32_t add(struct upcall_instance *inst, const char *name, size_t length) {
    uint32_t at = inst->counter_count;
    if (at == WIRE_COUNTERS)
        return -1;
    char *into = inst->counters[at].name;
    memset(into, 0, WIRE_COUNTER_NAME_SIZE);
    memcpy(into + 1, name + 1, length - 1);
    atomic_store_explicit((_Atomic char *)into, name[0], memory_order_release);
    atomic_store_explicit(&inst->counter_count, at + 1, memory_order_release);
    return (int32_t)at;
}

int32_t uh_counter(struct upcall_instance *inst, const char *name) {
    size_t length = name ? strnlen(name, WIRE_COUNTER_NAME_SIZE) : 0;
    if (length == 0 || length == WIRE_COUNTER_NAME_SIZE)
        return -1;
    pthread_mutex_lock(&inst->lock);
    int32_t counter = find(inst, name);
    if (counter < 0)
        counter = add(inst, name, length);
    pthread_mutex_unlock(&inst->lock);
    return counter;
}

void uh_counter_add(struct upcall_instance *inst, int32_t counter, uint64_t delta) {
    uint32_t count = atomic_load_explicit(&inst->counter_count, memory_order_acquire);
    if (counter < 0 || (uint32_t)counter >= count)
        return;
    /* Relaxed: a number for people; nothing is ordered by it. */
    atomic_fetch_add_explicit((_Atomic uint64_t *)&inst->counters[counter].value, delta,
                              memory_order_relaxed);
}
