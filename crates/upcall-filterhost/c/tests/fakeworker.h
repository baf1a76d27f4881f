/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The worker's side of an up-call, as simple as it can be, for tests.
 *
 * Talks to a filter host in a process of its own or, inline, in a thread of this
 * one; the tests are the same. Written from the documents, not from the filter
 * host's code: it shares only wire.h with it.
 */
#ifndef FAKEWORKER_H
#define FAKEWORKER_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

#include "../wire.h"

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);           \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)
#define CHECK_IS(value, expected)                                                             \
    do {                                                                                      \
        long long value_ = (long long)(value), expected_ = (long long)(expected);             \
        if (value_ != expected_) {                                                            \
            fprintf(stderr, "%s:%d: %s is %lld, not %lld (%s)\n", __FILE__, __LINE__, #value, \
                    value_, expected_, #expected);                                            \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

#define ARENA_SIZE (4u << 20)
#define ISSUE_ARENA_SIZE (16u << 20)
#define CHANNELS 2

struct fake_channel {
    int memfd, host_bell, worker_bell;
    unsigned char *base;
    uint32_t entries, put, taken;
    struct wire_completion returned[256]; /* inline: what deliver() gave */
    uint32_t returned_first, returned_count;
};

struct fake_worker {
    const char *host_path; /* NULL: inline */
    pid_t pid;
    struct upcall_host *inline_host;
    int socket;
    struct fake_channel channels[CHANNELS];
    unsigned char *arena, *issue_arena;
    int arena_fd, issue_arena_fd, counters_fd, file_fd;
    struct wire_counter *counters;
    char logs[1 << 16]; /* all LOG lines, each with a newline */
    uint32_t log_lines;
    char text[WIRE_MESSAGE_MAX + 1]; /* of the last answer */
    uint32_t answer; /* its kind */
    int result;      /* 0, or the negative errno of a RESULT */
    uint64_t token;
};

/* How worker_start runs the host: set by main(). NULL: inline. */
extern const char *fake_host_path;

/* Starts a host with this shared object; no message has been sent. */
struct fake_worker *worker_start(const char *filter);
/* Sends a message, takes its answer; 0 or the negative errno of a RESULT, 0 for a DESCRIPTION. */
int worker_say(struct fake_worker *w, uint32_t kind, uint32_t id, uint32_t value,
               const void *payload, size_t length, const int *fds, uint32_t fd_count);
/* Sends bytes as they are. */
void worker_send_raw(struct fake_worker *w, const void *bytes, size_t length, const int *fds,
                     uint32_t fd_count);
/* Takes messages until one is no LOG. False: the socket has ended. */
bool worker_hear(struct fake_worker *w);
/* ARENA, ISSUE_ARENA, both CHANNELs (entries each), LOAD. */
void worker_prepare(struct fake_worker *w, uint32_t entries, bool writable);
/* The bytes of an OPEN with the test filter's parameters; returns their number. */
size_t worker_open_payload(unsigned char *into, const char *text);
int worker_open(struct fake_worker *w, uint32_t instance, const char *text);
/* All of it: prepare, open instance 0, START. */
struct fake_worker *worker_ready(const char *filter);
/* Says QUIT and checks that the host ends well. */
void worker_quit(struct fake_worker *w);
/* Checks that the host ends with this status by itself (waitpid's; inline: run's result). */
void worker_expect_end(struct fake_worker *w, int status);

/* Puts a submission on a channel and rings if the host sleeps; returns its token. */
uint64_t submit(struct fake_worker *w, uint32_t channel, struct wire_submission entry);
/* Takes the next completion; false if none comes in time. */
bool reap(struct fake_worker *w, uint32_t channel, uint32_t timeout_ms, struct wire_completion *out);
/* The next completion, which must be this kind of entry for this token. */
struct wire_completion expect(struct fake_worker *w, uint32_t channel, uint32_t kind, uint64_t token);
/* START of a write of 512 bytes (or @op) at behaviour @block. */
struct wire_submission start_of(uint32_t block, uint8_t op);

uint64_t now_ms(void);
void sleep_ms(uint32_t ms);
int memfd_of(size_t size);

#endif
