/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Filters that are right or wrong in one thing, chosen with -DV_...; see table_test.c for what
 * is expected of each.
 */
#include <errno.h>
#include <upcall/filter.h>

static uint32_t pass(void *self, struct upcall_request *req) {
    (void)self;
    (void)req;
    return UPCALL_PASS;
}

static int32_t fail_to_load(const struct upcall_services *services) {
    (void)services;
    return -EPERM;
}

#define OPS (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE))

static const struct upcall_param params[] = {
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_STRING,
#ifdef V_PARAM_NAME
      .name = "Upper",
#else
      .name = "text",
#endif
      .doc = "Quotes \" back\\slash, \n line, \x01, caf\xc3\xa9, bad \xff\xc3( \xed\xa0\x80.",
      .default_value = "\t", .min = INT64_MIN, .max = INT64_MAX },
#ifdef V_PARAM_TWICE
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_STRING, .name = "text" },
#elif defined V_PARAM_TYPE
    { .size = sizeof(struct upcall_param), .type = 99, .name = "other" },
#else
    { .size = sizeof(struct upcall_param), .type = UPCALL_PARAM_CHOICE, .name = "other",
      .choices = "a|b", .default_value = "a" },
#endif
};

#ifdef V_NO_SYMBOL
const struct upcall_filter another_name = {
#else
UPCALL_EXPORT_FILTER = {
#endif
#if defined V_SHORT /* as an older minor version would be: start_io is its last member */
    .size = offsetof(struct upcall_filter, start_io) + sizeof(void *),
#elif defined V_TOO_SHORT
    .size = offsetof(struct upcall_filter, start_io),
#elif defined V_TOO_LONG
    .size = sizeof(struct upcall_filter) + 8,
#else
    .size = sizeof(struct upcall_filter),
#endif
#if defined V_NEWER
    .abi_version = UPCALL_ABI_VERSION + 1,
#elif defined V_OTHER_MAJOR
    .abi_version = (UPCALL_ABI_MAJOR + 1) << 16,
#else
    .abi_version = UPCALL_ABI_VERSION,
#endif
#ifdef V_NAME
    .name = "No Good Name",
#else
    .name = "variant",
#endif
    .version = "1",
    .summary = "caf\xc3\xa9 \"quoted\"",
#ifdef V_CLASS
    .filter_class = 9,
#else
    .filter_class = UPCALL_CLASS_CAPTURE,
#endif
#ifdef V_FLAGS
    .flags = 8,
#endif
#ifdef V_OPS
    .ops = OPS | 1,
#else
    .ops = OPS,
#endif
#if defined V_SEES_MORE
    .sees = UPCALL_OP_BIT(UPCALL_FLUSH),
#else
    .sees = OPS,
#endif
#ifdef V_ANSWERS_WITHOUT_FLUSH
    .answers = UPCALL_OP_BIT(UPCALL_WRITE),
#endif
    .param_count = 2,
#ifndef V_NO_PARAMS
    .params = params,
#endif
#ifndef V_NO_START
    .start_io = pass,
#endif
#ifdef V_LOAD_FAILS
    .load = fail_to_load,
#endif
    .io_done = pass, /* beyond the end of V_SHORT */
};

/* Every variant uses all of this file. */
const void *const used_by_some_variants[] = { (const void *)pass, (const void *)fail_to_load, params };
