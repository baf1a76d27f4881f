/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * An instance's parameters: text, number, or descriptor, as the filter declared them.
 *
 * The worker has checked ranges and choices and said so to the operator. Here a
 * value only has to be what its type says; one that is not is our own bug, or a
 * filter that changed under us, and the instance is not opened.
 */
#include "host.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct unit {
    const char *text;
    int64_t factor;
};
static const struct unit size_units[] = {
    { "", 1 }, { "K", 1 << 10 }, { "M", 1 << 20 }, { "G", 1 << 30 }, { "T", INT64_C(1) << 40 },
    { NULL, 0 },
};
static const struct unit time_units[] = {
    { "", 1 }, { "ms", 1 }, { "s", 1000 }, { "m", 60000 }, { "h", 3600000 }, { NULL, 0 },
};
static const struct unit no_units[] = { { "", 1 }, { NULL, 0 } };

static bool parse_number(const char *text, const struct unit *units, int64_t *number) {
    char *rest;
    errno = 0;
    if (!((*text >= '0' && *text <= '9') || *text == '-'))
        return false;
    long long value = strtoll(text, &rest, 10);
    if (errno != 0 || rest == text)
        return false;
    for (; units->text; units++)
        if (strcmp(rest, units->text) == 0)
            return !__builtin_mul_overflow((int64_t)value, units->factor, number);
    return false;
}

static bool parse_bool(const char *text, int64_t *number) {
    static const char *const words[] = { "false", "true", "no", "yes", "off", "on", "0", "1" };
    for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
        if (strcmp(text, words[i]) == 0) {
            *number = i & 1;
            return true;
        }
    return false;
}

static bool parse(uint32_t type, const char *text, int64_t *number) {
    switch (type) {
    case UPCALL_PARAM_INT: return parse_number(text, no_units, number);
    case UPCALL_PARAM_SIZE: return parse_number(text, size_units, number);
    case UPCALL_PARAM_MILLIS: return parse_number(text, time_units, number);
    case UPCALL_PARAM_BOOL: return parse_bool(text, number);
    default: return true;
    }
}

static bool takes_file(uint32_t type) {
    return type == UPCALL_PARAM_FILE_READ || type == UPCALL_PARAM_FILE_APPEND ||
           type == UPCALL_PARAM_ADDRESS;
}

static const struct upcall_param *declared(struct upcall_host *host, const char *name) {
    for (uint32_t i = 0; i < host->table.param_count; i++)
        if (strcmp(host->params[i].name, name) == 0)
            return &host->params[i];
    return NULL;
}

static struct uh_parameter *find(struct upcall_instance *inst, const char *name) {
    for (uint32_t i = 0; name && i < inst->parameter_count; i++)
        if (strcmp(inst->parameters[i].name, name) == 0)
            return &inst->parameters[i];
    return NULL;
}

static char *read_text(struct uh_reader *reader, size_t length) {
    if (reader->left < length || memchr(reader->at, 0, length))
        return NULL;
    char *text = malloc(length + 1);
    if (!text)
        return NULL;
    uh_read(reader, text, length);
    text[length] = 0;
    return text;
}

static int read_one(struct upcall_host *host, struct upcall_instance *inst,
                    struct uh_reader *reader, int *files, uint32_t file_count) {
    uint16_t name_length, value_length;
    uint32_t file;
    char *name = NULL, *value = NULL;
    if (uh_read(reader, &name_length, 2) && uh_read(reader, &value_length, 2) &&
        uh_read(reader, &file, 4) && (name = read_text(reader, name_length)))
        value = read_text(reader, value_length);
    if (!value) {
        free(name);
        return uh_fail(host, -EINVAL, "OPEN ends within parameter %u", inst->parameter_count);
    }
    const struct upcall_param *p = declared(host, name);
    bool twice = find(inst, name) != NULL;
    struct uh_parameter *into = &inst->parameters[inst->parameter_count++];
    *into = (struct uh_parameter){ .name = name, .value = value, .fd = -1 };
    if (!p || twice)
        return uh_fail(host, -EINVAL, "%s parameter %.31s", twice ? "twice the" : "unknown", name);
    if (!parse(p->type, value, &into->number))
        return uh_fail(host, -EINVAL, "parameter %s cannot be %.64s", name, value);
    if ((file != WIRE_NO_FILE) != takes_file(p->type) ||
        (file != WIRE_NO_FILE && (file >= file_count || files[file] < 0)))
        return uh_fail(host, -EINVAL, "parameter %s and the descriptors do not fit", name);
    if (file != WIRE_NO_FILE) {
        into->fd = files[file];
        files[file] = -1;
    }
    return 0;
}

/* Descriptors that are taken become -1 in @files. After an error, uh_params_free(). */
int uh_params_read(struct upcall_host *host, struct upcall_instance *inst, uint32_t count,
                   struct uh_reader *reader, int *files, uint32_t file_count) {
    if (count > host->table.param_count)
        return uh_fail(host, -EINVAL, "%u parameters; filter %s has %u", count, host->table.name,
                       host->table.param_count);
    inst->parameters = calloc(count ? count : 1, sizeof(*inst->parameters));
    if (!inst->parameters)
        return uh_fail(host, -ENOMEM, "out of memory");
    for (uint32_t i = 0; i < count; i++) {
        int error = read_one(host, inst, reader, files, file_count);
        if (error)
            return error;
    }
    for (uint32_t i = 0; i < host->table.param_count; i++)
        if (!takes_file(host->params[i].type) && !find(inst, host->params[i].name))
            return uh_fail(host, -EINVAL, "parameter %s is missing", host->params[i].name);
    for (uint32_t i = 0; i < file_count; i++)
        if (files[i] >= 0)
            return uh_fail(host, -EINVAL, "descriptor %u belongs to no parameter", i);
    return 0;
}

void uh_params_free(struct upcall_instance *inst) {
    for (uint32_t i = 0; i < inst->parameter_count; i++) {
        free(inst->parameters[i].name);
        free(inst->parameters[i].value);
        if (inst->parameters[i].fd >= 0)
            close(inst->parameters[i].fd);
    }
    free(inst->parameters);
    inst->parameters = NULL;
    inst->parameter_count = 0;
}

int64_t uh_param_int(struct upcall_instance *inst, const char *name) {
    const struct uh_parameter *p = find(inst, name);
    return p ? p->number : 0;
}

const char *uh_param_string(struct upcall_instance *inst, const char *name) {
    const struct uh_parameter *p = find(inst, name);
    return p ? p->value : NULL;
}

int uh_param_fd(struct upcall_instance *inst, const char *name) {
    const struct uh_parameter *p = find(inst, name);
    return p ? p->fd : -1;
}
