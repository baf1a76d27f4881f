/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The sidecar: an instance's own small durable state, in a file of two slots. The
 * crate upcall-state has the table of bytes, makes the file, and reads it offline.
 *
 * A sync writes the state with the next sequence number into the slot that is not
 * known to be good, syncs, then does the same with the other. So at every moment one
 * slot holds, whole and durably, the state before or the new one; and between syncs
 * both hold the same state, so that one rotten slot costs nothing.
 *
 * Always true: what open() of a filter reads is durable, because where the slots
 * differ the newer state is first written to the other slot and synced; a state in
 * no whole slot is told as -EIO, never as empty; a failed sync is told, and leaves
 * one slot as it was.
 */
#include "host.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Of a slot's header. */
enum { AT_MAGIC = 0, AT_VERSION = 8, AT_LENGTH = 12, AT_SEQUENCE = 16, AT_CHECKSUM = 60 };

/* ---- checksum ---- */

static uint32_t crc_table[256];
static pthread_once_t crc_made = PTHREAD_ONCE_INIT;

static void make_crc_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? (crc >> 1) ^ 0x82f63b78u : crc >> 1; /* Castagnoli, reflected */
        crc_table[i] = crc;
    }
}

static uint32_t crc32c(uint32_t crc, const unsigned char *bytes, size_t length) {
    crc = ~crc;
    for (size_t i = 0; i < length; i++)
        crc = (crc >> 8) ^ crc_table[(crc ^ bytes[i]) & 0xff];
    return ~crc;
}

static uint32_t checksum(const unsigned char *slot, uint32_t length) {
    pthread_once(&crc_made, make_crc_table);
    return crc32c(crc32c(0, slot, AT_CHECKSUM), slot + WIRE_SIDECAR_HEADER, length);
}

/* ---- a slot ---- */

static void put_number(unsigned char *at, uint64_t number, uint32_t bytes) {
    for (uint32_t i = 0; i < bytes; i++)
        at[i] = (unsigned char)(number >> (8 * i));
}

static uint64_t get_number(const unsigned char *at, uint32_t bytes) {
    uint64_t number = 0;
    for (uint32_t i = 0; i < bytes; i++)
        number |= (uint64_t)at[i] << (8 * i);
    return number;
}

static void make_slot(unsigned char *slot, uint64_t sequence, const unsigned char *state,
                      uint32_t length) {
    memset(slot, 0, WIRE_SIDECAR_HEADER);
    memcpy(slot + AT_MAGIC, WIRE_SIDECAR_MAGIC, 8);
    put_number(slot + AT_VERSION, WIRE_SIDECAR_VERSION, 4);
    put_number(slot + AT_LENGTH, length, 4);
    put_number(slot + AT_SEQUENCE, sequence, 8);
    memcpy(slot + WIRE_SIDECAR_HEADER, state, length);
    put_number(slot + AT_CHECKSUM, checksum(slot, length), 4);
}

/* Whether the first @have bytes of @slot hold a whole state. */
static bool is_whole(const unsigned char *slot, size_t have) {
    if (have < WIRE_SIDECAR_HEADER || memcmp(slot + AT_MAGIC, WIRE_SIDECAR_MAGIC, 8) != 0 ||
        get_number(slot + AT_VERSION, 4) != WIRE_SIDECAR_VERSION)
        return false;
    uint32_t length = (uint32_t)get_number(slot + AT_LENGTH, 4);
    return length <= WIRE_SIDECAR_MAX && have - WIRE_SIDECAR_HEADER >= length &&
           checksum(slot, length) == get_number(slot + AT_CHECKSUM, 4);
}

/* Bytes read; what cannot be read is as good as damaged. */
static size_t read_slot(int fd, uint32_t number, unsigned char *slot) {
    const size_t size = WIRE_SIDECAR_HEADER + WIRE_SIDECAR_MAX;
    size_t have = 0;
    while (have < size) {
        ssize_t length = pread(fd, slot + have, size - have,
                               (off_t)(number * (size_t)WIRE_SIDECAR_SLOT + have));
        if (length < 0 && errno == EINTR)
            continue;
        if (length <= 0)
            break;
        have += (size_t)length;
    }
    return have;
}

/* How much is written at once: all, except where a test is to find half of it. */
static size_t next_write(size_t size, size_t done) {
#ifdef UPCALL_HOST_POINTS
    return done == 0 ? size / 2 : size - done;
#else
    return size - done;
#endif
}

/* Writes the slot that was made in sidecar->slot, durably. 0 or a negative errno. */
static int store_slot(struct uh_sidecar *sidecar, uint32_t number) {
    size_t size = WIRE_SIDECAR_HEADER + (size_t)get_number(sidecar->slot + AT_LENGTH, 4);
    uh_point(UH_POINT_SLOT, number, 0);
    for (size_t done = 0; done < size;) {
        ssize_t length = pwrite(sidecar->fd, sidecar->slot + done, next_write(size, done),
                                (off_t)(number * (size_t)WIRE_SIDECAR_SLOT + done));
        if (length < 0 && errno == EINTR)
            continue;
        if (length <= 0)
            return length < 0 ? -errno : -EIO;
        done += (size_t)length;
        uh_point(done < size ? UH_POINT_SLOT_HALF : UH_POINT_SLOT_WHOLE, number, 0);
    }
    while (fdatasync(sidecar->fd) != 0)
        if (errno != EINTR)
            return -errno;
    uh_point(UH_POINT_SLOT_SYNCED, number, 0);
    return 0;
}

/* ---- open, close ---- */

void uh_sidecar_init(struct upcall_instance *inst) {
    pthread_mutex_init(&inst->sidecar.syncing, NULL);
    pthread_mutex_init(&inst->sidecar.lock, NULL);
    inst->sidecar.fd = -1;
}

void uh_sidecar_free(struct upcall_instance *inst) {
    uh_sidecar_close(inst);
    pthread_mutex_destroy(&inst->sidecar.lock);
    pthread_mutex_destroy(&inst->sidecar.syncing);
}

void uh_sidecar_close(struct upcall_instance *inst) {
    struct uh_sidecar *sidecar = &inst->sidecar;
    if (sidecar->fd >= 0)
        close(sidecar->fd);
    free(sidecar->state);
    free(sidecar->slot);
    sidecar->fd = -1;
    sidecar->state = sidecar->slot = NULL;
    sidecar->length = 0;
    sidecar->error = 0;
    sidecar->changes = sidecar->synced = sidecar->sequence = 0;
    sidecar->newest = 0;
}

/* Takes the newer of the whole slots into memory. Whether the other has to be written. */
static bool take_newest(struct uh_sidecar *sidecar) {
    uint64_t sequences[2] = { 0, 0 };
    bool whole[2];
    sidecar->error = -EIO;
    for (uint32_t number = 0; number < 2; number++) {
        size_t have = read_slot(sidecar->fd, number, sidecar->slot);
        whole[number] = is_whole(sidecar->slot, have);
        if (!whole[number])
            continue;
        sequences[number] = get_number(sidecar->slot + AT_SEQUENCE, 8);
        if (sidecar->error == 0 && sequences[number] <= sidecar->sequence)
            continue;
        sidecar->error = 0;
        sidecar->newest = number;
        sidecar->sequence = sequences[number];
        sidecar->length = (uint32_t)get_number(sidecar->slot + AT_LENGTH, 4);
        memcpy(sidecar->state, sidecar->slot + WIRE_SIDECAR_HEADER, sidecar->length);
    }
    return sidecar->error == 0 && !(whole[0] && whole[1] && sequences[0] == sequences[1]);
}

int uh_sidecar_open(struct upcall_instance *inst, int fd) {
    struct uh_sidecar *sidecar = &inst->sidecar;
    unsigned char *state = malloc(WIRE_SIDECAR_MAX);
    unsigned char *slot = malloc(WIRE_SIDECAR_HEADER + WIRE_SIDECAR_MAX);
    if (!state || !slot) {
        free(state);
        free(slot);
        return -ENOMEM;
    }
    sidecar->state = state;
    sidecar->slot = slot;
    sidecar->fd = fd;
    if (take_newest(sidecar)) {
        make_slot(slot, sidecar->sequence, state, sidecar->length);
        sidecar->error = store_slot(sidecar, !sidecar->newest);
    }
    if (sidecar->error)
        uh_logf(inst->host, inst, UPCALL_LOG_ERROR, "the sidecar cannot be used as it is: %s",
                sidecar->error == -EIO ? "neither of its slots is whole"
                                       : strerror(-sidecar->error));
    return 0;
}

/* ---- services ---- */

int32_t uh_sidecar_read(struct upcall_instance *inst, void *buf, uint32_t size) {
    struct uh_sidecar *sidecar = &inst->sidecar;
    if (sidecar->fd < 0)
        return -ENOTSUP;
    pthread_mutex_lock(&sidecar->lock);
    int32_t result = sidecar->error ? sidecar->error : (int32_t)sidecar->length;
    if (result > 0 && size > 0)
        memcpy(buf, sidecar->state, size < sidecar->length ? size : sidecar->length);
    pthread_mutex_unlock(&sidecar->lock);
    return result;
}

int32_t uh_sidecar_write(struct upcall_instance *inst, const void *data, uint32_t length) {
    struct uh_sidecar *sidecar = &inst->sidecar;
    if (sidecar->fd < 0)
        return -ENOTSUP;
    if (length > WIRE_SIDECAR_MAX)
        return -E2BIG;
    pthread_mutex_lock(&sidecar->lock);
    if (length)
        memcpy(sidecar->state, data, length);
    sidecar->length = length;
    sidecar->error = 0;
    sidecar->changes++;
    pthread_mutex_unlock(&sidecar->lock);
    return 0;
}

/* With `syncing`. */
static int sync_state(struct uh_sidecar *sidecar) {
    pthread_mutex_lock(&sidecar->lock);
    uint64_t changes = sidecar->changes;
    int error = sidecar->error;
    bool is_new = changes != sidecar->synced;
    if (is_new)
        make_slot(sidecar->slot, ++sidecar->sequence, sidecar->state, sidecar->length);
    pthread_mutex_unlock(&sidecar->lock);
    if (!is_new)
        return error;
    error = store_slot(sidecar, !sidecar->newest);
    if (error)
        return error;
    sidecar->newest = !sidecar->newest;
    error = store_slot(sidecar, !sidecar->newest);
    if (error)
        return error;
    pthread_mutex_lock(&sidecar->lock);
    sidecar->synced = changes;
    pthread_mutex_unlock(&sidecar->lock);
    return 0;
}

int32_t uh_sidecar_sync(struct upcall_instance *inst) {
    struct uh_sidecar *sidecar = &inst->sidecar;
    if (sidecar->fd < 0)
        return -ENOTSUP;
    pthread_mutex_lock(&sidecar->syncing);
    int error = sync_state(sidecar);
    pthread_mutex_unlock(&sidecar->syncing);
    return error;
}
