/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * xor: a toy that changes data in both directions. See upcall-xor.7. It hides nothing from
 * anybody; it shows that what a filter writes is what lies on the disk.
 *
 * The disk is taken as 64-bit little-endian words. Word number n (its byte offset / 8) has
 * the key word K[n], output n of splitmix64 seeded with the 64-bit FNV-1a hash of the
 * parameter `key`. A sector of 512 bytes (64 words) D with the key words K becomes
 *
 *     f(0) = 0      f(K) = K      f(D) = D xor K otherwise
 *
 * f undoes itself: D xor K is neither 0 (then D were K) nor K (then D were 0). And it keeps
 * zeroes, so a discarded or zeroed range still reads as zeroes above, and these
 * requests pass down as they are. K is never all zeroes: splitmix64 gives 0 for one
 * state only.
 *
 * unxor.py reads such a disk without any of this code.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <upcall/filter.h>

#define SECTOR 512u
#define WORDS (SECTOR / 8u)

static const struct upcall_services *up;

struct xor {
    struct upcall_instance *inst;
    uint64_t seed;
    int32_t bytes_read, bytes_written; /* counters */
};

static uint64_t fnv1a(const char *text) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (const unsigned char *s = (const unsigned char *)text; *s; s++)
        hash = (hash ^ *s) * UINT64_C(0x100000001b3);
    return hash;
}

/* Output @n (from 0) of splitmix64. */
static uint64_t key_word(uint64_t seed, uint64_t n) {
    uint64_t z = seed + (n + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* f, in place. @first is the number of the sector's first word. */
static void change_sector(uint64_t seed, uint64_t first, unsigned char *sector) {
    uint64_t words[WORDS], any = 0, differs = 0;
    memcpy(words, sector, SECTOR);
    for (uint32_t i = 0; i < WORDS; i++)
        any |= words[i];
    if (any == 0)
        return;
    for (uint32_t i = 0; i < WORDS; i++) {
        words[i] ^= htole64(key_word(seed, first + i));
        differs |= words[i];
    }
    if (differs != 0)
        memcpy(sector, words, SECTOR);
}

/* Offset and length are multiples of the block size, so of SECTOR. */
static void change(const struct xor *x, const struct upcall_request *req) {
    unsigned char *data = req->data;
    for (uint32_t at = 0; at < req->length; at += SECTOR)
        change_sector(x->seed, (req->offset + at) / 8, data + at);
}

static uint32_t fail(struct upcall_request *req) {
    req->status = -EIO;
    return UPCALL_FAIL;
}

static uint32_t xor_start_io(void *self, struct upcall_request *req) {
    struct xor *x = self;
    if (req->op == UPCALL_READ)
        return UPCALL_WATCH;
    if (req->op != UPCALL_WRITE)
        return UPCALL_PASS; /* discard and write zeroes: f(0) = 0 */
    if (!req->data)
        return fail(req); /* never to be written as it is */
    change(x, req);
    up->counter_add(x->inst, x->bytes_written, req->length);
    return UPCALL_PASS;
}

static uint32_t xor_io_done(void *self, struct upcall_request *req) {
    struct xor *x = self;
    if (req->op != UPCALL_READ || req->status != 0)
        return UPCALL_PASS;
    if (!req->data)
        return fail(req);
    change(x, req);
    up->counter_add(x->inst, x->bytes_read, req->length);
    return UPCALL_PASS;
}

static int32_t xor_open(struct upcall_instance *inst, void **self) {
    struct xor *x = malloc(sizeof(*x));
    const char *key = up->param_string(inst, "key");
    if (!x || !key) {
        free(x);
        return key ? -ENOMEM : -EINVAL;
    }
    x->inst = inst;
    x->seed = fnv1a(key);
    x->bytes_read = up->counter(inst, "bytes_read");
    x->bytes_written = up->counter(inst, "bytes_written");
    *self = x;
    return 0;
}

static int32_t xor_load(const struct upcall_services *services) {
    up = services;
    return 0;
}

static const struct upcall_param params[] = {
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_STRING, .name = "key",
      .doc = "The disk is changed with this; the same key reads it again.",
      .default_value = "upcall", .min = 1, .max = 256 },
};

UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter),
    .abi_version = UPCALL_ABI_VERSION,
    .name = "xor",
    .version = "0.1.0",
    .vendor = "Upcall",
    .summary = "Changes the data with a key, as an example; protects nothing",
    .filter_class = UPCALL_CLASS_ENCRYPTION,
    .ops = UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE) |
           UPCALL_OP_BIT(UPCALL_DISCARD) | UPCALL_OP_BIT(UPCALL_WRITE_ZEROES),
    .sees = UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE),
    .changes = UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE),
    .param_count = sizeof(params) / sizeof(*params),
    .params = params,
    .load = xor_load,
    .open = xor_open,
    .close = free,
    .start_io = xor_start_io,
    .io_done = xor_io_done,
};
