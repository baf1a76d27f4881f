/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What both ends of an up-call agree on: the C mirror of the crate upcall-abi.
 *
 * Ring entries, the layout of a channel's memfd, and the messages on the control
 * socket. What each field means is said once, in crates/upcall-abi/src/ring.rs and
 * control.rs; here are only the types. layout.c prints them, at 32 and 64 bits, and
 * a test compares them with the Rust types.
 */
#ifndef UPCALL_WIRE_H
#define UPCALL_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define WIRE_VERSION 1u

/* The channel: "UPCLRING" as a little-endian number, and where things are. */
#define WIRE_MAGIC UINT64_C(0x474e49524c435055)
#define WIRE_ENTRY_SIZE 64u
#define WIRE_ENTRIES_MAX 4096u
#define WIRE_ENTRIES_OFFSET 12u
#define WIRE_SUBMISSION_SLEEPING_OFFSET 64u
#define WIRE_COMPLETION_SLEEPING_OFFSET 128u
#define WIRE_SUBMISSION_HEAD_OFFSET 192u
#define WIRE_COMPLETION_HEAD_OFFSET 256u
#define WIRE_RINGS_OFFSET 4096u

#define WIRE_NO_DATA UINT64_MAX

/* wire_submission.kind */
enum { WIRE_START = 1, WIRE_DONE = 2, WIRE_CANCEL = 3, WIRE_ISSUED = 4 };

/* wire_completion.kind */
enum { WIRE_VERDICT = 1, WIRE_ISSUE = 2, WIRE_HELD = 3 };

struct wire_submission {
    _Alignas(8) uint32_t seq;
    uint8_t kind;
    uint8_t op;
    uint16_t flags;
    _Alignas(8) uint64_t token;
    uint64_t offset;
    uint32_t length;
    int32_t status;
    uint64_t data;
    uint64_t cookie;
    uint32_t instance;
    uint32_t disk;
    uint64_t reserved;
};

struct wire_completion {
    _Alignas(8) uint32_t seq;
    uint8_t kind;
    uint8_t code;
    uint16_t flags;
    _Alignas(8) uint64_t token;
    uint64_t offset;
    uint32_t length;
    int32_t status;
    uint64_t data;
    uint64_t cookie;
    uint32_t instance;
    uint32_t disk;
    uint64_t reserved;
};

/* The control socket. */
#define WIRE_MESSAGE_MAX 65536u
#define WIRE_DESCRIPTORS_MAX 32u
#define WIRE_SOCKET_FD 3
#define WIRE_FILTER_FD 4

/* wire_header.kind */
enum {
    WIRE_MSG_DESCRIBE = 1,
    WIRE_MSG_ARENA = 2,
    WIRE_MSG_ISSUE_ARENA = 3,
    WIRE_MSG_CHANNEL = 4,
    WIRE_MSG_LOAD = 5,
    WIRE_MSG_OPEN = 6,
    WIRE_MSG_START = 7,
    WIRE_MSG_EVENT = 8,
    WIRE_MSG_CLOSE = 9,
    WIRE_MSG_QUIT = 10,
    WIRE_MSG_SAVE_STATE = 11,
    WIRE_MSG_LOAD_STATE = 12,
    WIRE_MSG_DESCRIPTION = 101,
    WIRE_MSG_RESULT = 102,
    WIRE_MSG_LOG = 103
};

struct wire_header {
    uint32_t kind;
    uint32_t version;
    uint32_t id;
    uint32_t value;
};

/* Payload of ARENA. */
struct wire_arena {
    _Alignas(8) uint64_t size;
    uint32_t writable;
    uint32_t reserved;
};

/* Payload of OPEN: this, its disks, its parameters. */
struct wire_open {
    uint32_t arena;
    uint32_t disks;
    uint32_t parameters;
    uint32_t files; /* WIRE_OPEN_... */
};

#define WIRE_OPEN_SIDECAR 1u
#define WIRE_OPEN_EXTENTS 2u

struct wire_disk {
    _Alignas(8) uint64_t capacity;
    uint32_t block_size;
    uint32_t read_only;
};

/* One parameter in OPEN; name and value follow. Packed: read it with memcpy. */
#define WIRE_PARAMETER_SIZE 8u
#define WIRE_NO_FILE UINT32_MAX

/* On the socket for extents: a question, and its answer, behind which its extents are. */
struct wire_extents_question {
    _Alignas(8) uint64_t number;
    uint64_t offset;
    uint64_t length;
    uint32_t disk;
    uint32_t max;
};

struct wire_extents_answer {
    _Alignas(8) uint64_t number;
    uint32_t count;
    uint32_t reserved;
};

/* The counters memfd. */
#define WIRE_COUNTERS 63u
#define WIRE_COUNTERS_SIZE 4096u
#define WIRE_COUNTER_NAME_SIZE 48u

struct wire_counter {
    _Alignas(8) char name[WIRE_COUNTER_NAME_SIZE];
    uint64_t value;
    uint64_t reserved;
};

/* The sidecar's file: two slots, each a header and a state. See upcall-state. */
#define WIRE_SIDECAR_MAX 65536u
#define WIRE_SIDECAR_HEADER 64u
#define WIRE_SIDECAR_SLOT 131072u /* where slot 1 begins */
#define WIRE_SIDECAR_MAGIC "UPCALLSC"
#define WIRE_SIDECAR_VERSION 1u

/* Limits of requests, as upcall-abi's filter.rs has them. */
#define WIRE_LENGTH_MAX 0x7ffffe00u
#define WIRE_DATA_LENGTH_MAX (4u << 20)
#define WIRE_ISSUED_MAX 256u

#define WIRE_SAME_LAYOUT(type)                                                      \
    _Static_assert(sizeof(type) == WIRE_ENTRY_SIZE && _Alignof(type) == 8, #type); \
    _Static_assert(offsetof(type, kind) == 4 && offsetof(type, flags) == 6, #type); \
    _Static_assert(offsetof(type, token) == 8, #type);                              \
    _Static_assert(offsetof(type, offset) == 16, #type);                            \
    _Static_assert(offsetof(type, length) == 24, #type);                            \
    _Static_assert(offsetof(type, status) == 28, #type);                            \
    _Static_assert(offsetof(type, data) == 32, #type);                              \
    _Static_assert(offsetof(type, cookie) == 40, #type);                            \
    _Static_assert(offsetof(type, instance) == 48, #type);                          \
    _Static_assert(offsetof(type, disk) == 52, #type);                              \
    _Static_assert(offsetof(type, reserved) == 56, #type)
WIRE_SAME_LAYOUT(struct wire_submission);
WIRE_SAME_LAYOUT(struct wire_completion);
_Static_assert(sizeof(struct wire_header) == 16, "header");
_Static_assert(sizeof(struct wire_arena) == 16, "arena");
_Static_assert(sizeof(struct wire_open) == 16, "open");
_Static_assert(sizeof(struct wire_disk) == 16, "disk");
_Static_assert(sizeof(struct wire_extents_question) == 32, "question");
_Static_assert(sizeof(struct wire_extents_answer) == 16, "answer");
_Static_assert(offsetof(struct wire_disk, block_size) == 8, "disk");
_Static_assert(sizeof(struct wire_counter) == 64, "counter");
_Static_assert(offsetof(struct wire_counter, value) == 48, "counter");
_Static_assert(WIRE_COUNTERS * sizeof(struct wire_counter) <= WIRE_COUNTERS_SIZE, "counters");

#endif
