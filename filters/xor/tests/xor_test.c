/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What the filter xor does to data, checked on its table with services made up here.
 *
 *   xor_test IMAGE PLAIN   also writes a changed image and what it must read as
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <upcall/filter.h>

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);      \
            exit(1);                                                                     \
        }                                                                                \
    } while (0)

extern const struct upcall_filter upcall_filter;

static const char *param_string(struct upcall_instance *inst, const char *name) {
    (void)inst;
    CHECK(strcmp(name, "key") == 0);
    return "a k\xc3\xa9y";
}

static uint64_t counted;

static int32_t counter(struct upcall_instance *inst, const char *name) {
    (void)inst;
    (void)name;
    return 0;
}

static void counter_add(struct upcall_instance *inst, int32_t counter, uint64_t delta) {
    (void)inst;
    (void)counter;
    counted += delta;
}

static const struct upcall_services services = {
    .size = sizeof(services), .abi_version = UPCALL_ABI_VERSION, .param_string = param_string,
    .counter = counter, .counter_add = counter_add,
};

static void *self;

static uint32_t start(uint8_t op, uint64_t offset, uint32_t length, void *data) {
    struct upcall_request req = { .size = sizeof(req), .op = op, .offset = offset,
                                  .length = length, .data = data };
    uint32_t verdict = upcall_filter.start_io(self, &req);
    CHECK(verdict != UPCALL_FAIL || req.status == -EIO);
    return verdict;
}

static uint32_t done(uint8_t op, uint64_t offset, uint32_t length, void *data, int32_t status) {
    struct upcall_request req = { .size = sizeof(req), .op = op, .offset = offset,
                                  .length = length, .data = data, .status = status };
    uint32_t verdict = upcall_filter.io_done(self, &req);
    CHECK(verdict == UPCALL_FAIL || req.status == status);
    return verdict;
}

static void fill(unsigned char *data, size_t length) {
    for (size_t i = 0; i < length; i++)
        data[i] = (unsigned char)random();
}

/* The key words of the sector at @offset: a sector with one bit set gives them away. */
static void key_of(uint64_t offset, unsigned char *sector) {
    memset(sector, 0, 512);
    sector[0] = 1;
    CHECK(start(UPCALL_WRITE, offset, 512, sector) == UPCALL_PASS);
    sector[0] ^= 1;
}

static void a_write_is_changed_and_a_read_changes_it_back(void) {
    unsigned char plain[8192], data[8192];
    fill(plain, sizeof(plain));
    memcpy(data, plain, sizeof(data));
    CHECK(start(UPCALL_WRITE, 1 << 30, sizeof(data), data) == UPCALL_PASS);
    for (size_t i = 0; i < sizeof(data); i += 512)
        CHECK(memcmp(data + i, plain + i, 512) != 0);
    CHECK(start(UPCALL_READ, 1 << 30, sizeof(data), NULL) == UPCALL_WATCH);
    /* In two reads, that begin elsewhere than the write did. */
    CHECK(done(UPCALL_READ, 1 << 30, 512, data, 0) == UPCALL_PASS);
    CHECK(done(UPCALL_READ, (1 << 30) + 512, 7680, data + 512, 0) == UPCALL_PASS);
    CHECK(memcmp(data, plain, sizeof(data)) == 0);
    CHECK(counted >= 2 * sizeof(data));
}

static void two_sectors_have_two_keys(void) {
    unsigned char a[512], b[512], far[512];
    key_of(0, a);
    key_of(512, b);
    key_of(UINT64_C(1) << 40, far);
    CHECK(memcmp(a, b, 512) != 0 && memcmp(a, far, 512) != 0);
}

static void zeroes_stay_zeroes_and_the_key_stays_the_key(void) {
    unsigned char zero[512] = { 0 }, key[512], data[512];
    CHECK(start(UPCALL_WRITE, 4096, 512, memset(data, 0, 512)) == UPCALL_PASS);
    CHECK(memcmp(data, zero, 512) == 0);
    CHECK(done(UPCALL_READ, 4096, 512, data, 0) == UPCALL_PASS);
    CHECK(memcmp(data, zero, 512) == 0);
    key_of(4096, key);
    CHECK(memcmp(key, zero, 512) != 0);
    CHECK(start(UPCALL_WRITE, 4096, 512, memcpy(data, key, 512)) == UPCALL_PASS);
    CHECK(memcmp(data, key, 512) == 0);
    CHECK(done(UPCALL_READ, 4096, 512, data, 0) == UPCALL_PASS);
    CHECK(memcmp(data, key, 512) == 0);
}

static void discard_and_write_zeroes_pass(void) {
    CHECK(start(UPCALL_DISCARD, 0, 1 << 30, NULL) == UPCALL_PASS);
    CHECK(start(UPCALL_WRITE_ZEROES, 0, 1 << 30, NULL) == UPCALL_PASS);
}

static void a_failed_read_is_left_alone_and_missing_data_never_passes(void) {
    unsigned char data[512], before[512];
    fill(before, 512);
    memcpy(data, before, 512);
    CHECK(done(UPCALL_READ, 0, 512, data, -EIO) == UPCALL_PASS);
    CHECK(memcmp(data, before, 512) == 0);
    CHECK(start(UPCALL_WRITE, 0, 512, NULL) == UPCALL_FAIL);
    CHECK(done(UPCALL_READ, 0, 512, NULL, 0) == UPCALL_FAIL);
}

/* 3 MiB: noise, zeroes, single bits, and sectors that are the key. */
static void write_images(const char *image_path, const char *plain_path) {
    FILE *image = fopen(image_path, "wb"), *plain = fopen(plain_path, "wb");
    CHECK(image && plain);
    for (uint64_t sector = 0; sector < 3 * 2048; sector++) {
        unsigned char data[512] = { 0 };
        switch (sector % 7) {
        case 0: key_of(sector * 512, data); break;
        case 1: data[sector % 512] = 1; break;
        case 2: case 3: fill(data, 512); break;
        default: break;
        }
        CHECK(fwrite(data, 512, 1, plain) == 1);
        CHECK(start(UPCALL_WRITE, sector * 512, 512, data) == UPCALL_PASS);
        CHECK(fwrite(data, 512, 1, image) == 1);
    }
    CHECK(fclose(image) == 0 && fclose(plain) == 0);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    CHECK(upcall_filter.load(&services) == 0 && upcall_filter.open(NULL, &self) == 0);
    a_write_is_changed_and_a_read_changes_it_back();
    two_sectors_have_two_keys();
    zeroes_stay_zeroes_and_the_key_stays_the_key();
    discard_and_write_zeroes_pass();
    a_failed_read_is_left_alone_and_missing_data_never_passes();
    write_images(argv[1], argv[2]);
    upcall_filter.close(self);
    return 0;
}
