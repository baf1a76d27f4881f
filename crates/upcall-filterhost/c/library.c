/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The filter's shared object: loaded once, from its descriptor, and its table checked.
 *
 * What comes out (host->table, host->params) is a complete copy: a table or
 * parameter of an older minor version is shorter, and the rest is zero.
 */
#include "host.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OPS_ALL (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE) | \
                 UPCALL_OP_BIT(UPCALL_FLUSH) | UPCALL_OP_BIT(UPCALL_DISCARD) | \
                 UPCALL_OP_BIT(UPCALL_WRITE_ZEROES))
#define OPS_DATA (UPCALL_OP_BIT(UPCALL_READ) | UPCALL_OP_BIT(UPCALL_WRITE))
#define FLAGS_ALL (UPCALL_FILTER_ISSUES | UPCALL_FILTER_SIDECAR | UPCALL_FILTER_EXTENTS)
#define PARAMS_MAX 256u
#define WORD_BYTES_MAX 31u

static bool read_at(int fd, void *into, size_t length, uint64_t offset) {
    return offset <= INT64_MAX && pread(fd, into, length, (off_t)offset) == (ssize_t)length;
}

/* Whether the file ends before what its program headers say is in it. */
static bool is_cut(int fd, const ElfW(Ehdr) *elf) {
    struct stat stat;
    if (fstat(fd, &stat) != 0 || elf->e_phentsize != sizeof(ElfW(Phdr)))
        return true;
    for (uint32_t i = 0; i < elf->e_phnum; i++) {
        ElfW(Phdr) part;
        uint64_t size = (uint64_t)stat.st_size;
        if (!read_at(fd, &part, sizeof(part), (uint64_t)elf->e_phoff + i * sizeof(part)) ||
            part.p_offset > size || part.p_filesz > size - part.p_offset)
            return true;
    }
    return elf->e_phnum == 0;
}

/* The loader would say the same less clearly, or be killed by SIGBUS on a file that was cut. */
static int check_elf(struct upcall_host *host) {
    ElfW(Ehdr) elf;
    if (host->filter_path)
        return 0;
    if (!read_at(host->filter_fd, &elf, EI_NIDENT, 0) || memcmp(elf.e_ident, ELFMAG, SELFMAG) != 0)
        return uh_fail(host, -ENOEXEC, "the filter is not a shared object (no ELF file)");
    int width = elf.e_ident[EI_CLASS] == ELFCLASS64 ? 64 : elf.e_ident[EI_CLASS] == ELFCLASS32 ? 32 : 0;
    int ours = (int)(8 * sizeof(void *));
    if (width != ours)
        return uh_fail(host, -ENOEXEC, "the filter is built for %d bits, this filter host for %d: "
                       "start it with the other filter host", width, ours);
    if (!read_at(host->filter_fd, &elf, sizeof(elf), 0) || is_cut(host->filter_fd, &elf))
        return uh_fail(host, -ENOEXEC, "the filter's file is cut: it is shorter than its ELF "
                       "headers say; copy or build it again");
    return 0;
}

static bool is_word(const char *text, char also) {
    size_t length = strnlen(text, WORD_BYTES_MAX + 1);
    if (length == 0 || length > WORD_BYTES_MAX)
        return false;
    for (; *text; text++)
        if (!((*text >= 'a' && *text <= 'z') || (*text >= '0' && *text <= '9') || *text == also))
            return false;
    return true;
}

static int check_param(struct upcall_host *host, uint32_t index) {
    const struct upcall_param *p = &host->params[index];
    if (!p->name || !is_word(p->name, '_'))
        return uh_fail(host, -EINVAL, "parameter %u of filter %s has no good name: a-z, 0-9 and _, "
                       "at most 31 bytes", index, host->table.name);
    if (p->type < UPCALL_PARAM_INT || p->type > UPCALL_PARAM_ADDRESS)
        return uh_fail(host, -EINVAL, "parameter %s of filter %s has unknown type %u", p->name,
                       host->table.name, p->type);
    if (p->type == UPCALL_PARAM_CHOICE && !(p->choices && *p->choices))
        return uh_fail(host, -EINVAL, "parameter %s of filter %s has no choices", p->name,
                       host->table.name);
    for (uint32_t i = 0; i < index; i++)
        if (strcmp(host->params[i].name, p->name) == 0)
            return uh_fail(host, -EINVAL, "filter %s declares parameter %s twice",
                           host->table.name, p->name);
    return 0;
}

/* Elements of the filter's array are as long as the first one says. */
static int copy_params(struct upcall_host *host) {
    uint32_t count = host->table.param_count;
    if (count == 0)
        return 0;
    if (count > PARAMS_MAX || !host->table.params)
        return uh_fail(host, -EINVAL, "filter %s has %u parameters%s; at most %u",
                       host->table.name, count, host->table.params ? "" : " and no table of them",
                       PARAMS_MAX);
    const unsigned char *from = (const unsigned char *)host->table.params;
    uint32_t size = host->table.params->size;
    if (size < offsetof(struct upcall_param, default_value) || size > sizeof(*host->params))
        return uh_fail(host, -EINVAL, "parameters of filter %s have size %u, not %zu",
                       host->table.name, size, sizeof(*host->params));
    host->params = calloc(count, sizeof(*host->params));
    if (!host->params)
        return uh_fail(host, -ENOMEM, "out of memory");
    for (uint32_t i = 0; i < count; i++) {
        memcpy(&host->params[i], from + (size_t)i * size, size);
        if (host->params[i].size != size)
            return uh_fail(host, -EINVAL, "parameter %u of filter %s has size %u, the first has %u",
                           i, host->table.name, host->params[i].size, size);
        int error = check_param(host, i);
        if (error)
            return error;
    }
    return 0;
}

static int check_masks(struct upcall_host *host) {
    const struct upcall_filter *t = &host->table;
    const char *wrong = NULL;
    if (t->ops & ~OPS_ALL)
        wrong = "ops has unknown operations";
    else if ((t->sees | t->changes | t->answers) & ~t->ops)
        wrong = "sees, changes and answers must be parts of ops";
    else if ((t->sees | t->changes) & ~OPS_DATA)
        wrong = "sees and changes are for read and write only";
    else if ((t->answers & UPCALL_OP_BIT(UPCALL_WRITE)) && !(t->ops & UPCALL_OP_BIT(UPCALL_FLUSH)))
        wrong = "a filter that answers writes must declare flush";
    else if (t->flags & ~FLAGS_ALL)
        wrong = "flags has unknown bits";
    else if (t->filter_class < UPCALL_CLASS_INSPECTION || t->filter_class > UPCALL_CLASS_CAPTURE)
        wrong = "filter_class is none of UPCALL_CLASS_";
    return wrong ? uh_fail(host, -EINVAL, "the table of filter %s: %s", t->name, wrong) : 0;
}

static int copy_table(struct upcall_host *host, const struct upcall_filter *from) {
    uint32_t major = from->abi_version >> 16, minor = from->abi_version & 0xffff;
    if (major != UPCALL_ABI_MAJOR || minor > UPCALL_ABI_MINOR)
        return uh_fail(host, -ENOTSUP, "the filter is built for ABI %u.%u, this Upcall speaks "
                       "%u.0 to %u.%u: rebuild the filter, or use a newer Upcall", major, minor,
                       UPCALL_ABI_MAJOR, UPCALL_ABI_MAJOR, UPCALL_ABI_MINOR);
    const uint32_t least = offsetof(struct upcall_filter, start_io) + sizeof(from->start_io);
    if (from->size < least || from->size > sizeof(*from))
        return uh_fail(host, -EINVAL, "the filter's table says size %u; between %u and %zu are "
                       "possible for ABI %u.%u", from->size, least, sizeof(*from), major, minor);
    memset(&host->table, 0, sizeof(host->table));
    memcpy(&host->table, from, from->size);
    if (!host->table.name || !is_word(host->table.name, '-'))
        return uh_fail(host, -EINVAL, "the filter has no good name: a-z, 0-9 and -, at most 31 "
                       "bytes");
    if (!host->table.start_io)
        return uh_fail(host, -EINVAL, "filter %s has no start_io", host->table.name);
    int error = check_masks(host);
    return error ? error : copy_params(host);
}

int uh_library_open(struct upcall_host *host) {
    if (host->library)
        return 0;
    int error = check_elf(host);
    if (error)
        return error;
    char by_descriptor[32];
    snprintf(by_descriptor, sizeof(by_descriptor), "/proc/self/fd/%d", host->filter_fd);
    const char *name = host->filter_path ? host->filter_path : by_descriptor;
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return uh_fail(host, -ENOEXEC, "the filter cannot be loaded: %s", dlerror());
    const struct upcall_filter *table = dlsym(library, "upcall_filter");
    error = table ? copy_table(host, table)
                  : uh_fail(host, -ENOENT, "the shared object is no filter: it exports no symbol "
                            "upcall_filter (UPCALL_EXPORT_FILTER defines it)");
    host->library = library;
    if (error)
        uh_library_close(host);
    else
        uh_points_find(library);
    return error;
}

/*
 * The loader knows the library by the number of its descriptor. A library that stays in
 * spite of dlclose() (thread-local destructors do that) would be found again by
 * the next one of that number, so the number stays taken with it.
 */
void uh_library_close(struct upcall_host *host) {
    free(host->params);
    host->params = NULL;
    if (!host->library)
        return;
    char name[32];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", host->filter_fd);
    dlclose(host->library);
    host->library = NULL;
    if (host->filter_path || !host->inline_mode)
        return;
    void *stays = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (stays) {
        dlclose(stays);
        host->filter_fd = -1;
    }
}
