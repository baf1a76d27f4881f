/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What a filter host gives up before it loads its filter, so that the bounds that it was
 * started with hold, also for root, and nothing of it outlives it.
 *
 * Always true, from here on: it gains no privilege (no_new_privs), has no capability that
 * lifts a bound, cannot change a bound, and can neither fork nor execute. A thread ends with
 * its process; another process would keep the disks' pages and the rings mapped when this
 * one is killed, and what it then wrote would be taken for the data of the next life.
 *
 * Nothing here needs a privilege: what cannot be given up is not there.
 */
#include "host.h"

#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__i386__)
#define ARCH AUDIT_ARCH_I386
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#endif

/*
 * Root's capabilities that stay: about files, of which a filter's library may need some, and
 * low ports. All others are dropped, CAP_SYS_RESOURCE (limits), CAP_IPC_LOCK (locked memory)
 * and CAP_SYS_NICE (the processor) first of all.
 */
#define BIT(cap) (UINT64_C(1) << (cap))
#define KEPT (BIT(CAP_CHOWN) | BIT(CAP_DAC_OVERRIDE) | BIT(CAP_DAC_READ_SEARCH) | \
              BIT(CAP_FOWNER) | BIT(CAP_FSETID) | BIT(CAP_NET_BIND_SERVICE))

static int drop_capabilities(void) {
    /* Of the bounding set too, where that is allowed; otherwise no_new_privs alone keeps them out. */
    for (unsigned cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
        if (cap >= 64 || !(KEPT & BIT(cap)))
            prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) != 0)
        return -errno;
    for (int i = 0; i < 2; i++) {
        uint32_t kept = (uint32_t)(KEPT >> (32 * i));
        data[i].effective &= kept;
        data[i].permitted &= kept;
        data[i].inheritable = 0;
    }
    return syscall(SYS_capset, &header, data) == 0 ? 0 : -errno;
}

#ifdef ARCH
/* Where the low half of an argument is; both ends of Linux that we build for are little-endian. */
#define ARGUMENT_LOW(n) (uint32_t)(offsetof(struct seccomp_data, args) + 8 * (n))
#define LOAD(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset)
#define RETURN(what) BPF_STMT(BPF_RET | BPF_K, what)
#define DENY RETURN(SECCOMP_RET_ERRNO | EPERM)
#define ALLOW RETURN(SECCOMP_RET_ALLOW)
/* The call of that number ends in the next statement, any other goes on behind it. */
#define IF_CALL(number) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(number), 0, 1)

static const struct sock_filter rules[] = {
    /* Calls by another architecture's numbers would go past the rest. */
    LOAD((uint32_t)offsetof(struct seccomp_data, arch)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0),
    DENY,
    LOAD((uint32_t)offsetof(struct seccomp_data, nr)),
#if defined(__x86_64__)
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000u, 0, 1), /* x32's */
    DENY,
#endif
#ifdef __NR_fork
    IF_CALL(__NR_fork), DENY,
    IF_CALL(__NR_vfork), DENY,
#endif
    IF_CALL(__NR_execve), DENY,
    IF_CALL(__NR_execveat), DENY,
    /* Its arguments are in memory, which is not ours to read; the C library then uses clone(). */
    IF_CALL(435 /* clone3 */), RETURN(SECCOMP_RET_ERRNO | ENOSYS),
    IF_CALL(__NR_setrlimit), DENY,
    /* The worker weighs its threads by their process group. */
    IF_CALL(__NR_setpgid), DENY,
    IF_CALL(__NR_setsid), DENY,
    IF_CALL(__NR_ptrace), DENY,
    IF_CALL(__NR_process_vm_writev), DENY,
    /* clone(): threads alone. */
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_clone, 0, 4),
    LOAD(ARGUMENT_LOW(0)),
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 0, 1),
    ALLOW,
    DENY,
    /* prlimit64(): asking, no setting: its third argument is null. */
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_prlimit64, 0, 6),
    LOAD(ARGUMENT_LOW(2)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 3),
    LOAD(ARGUMENT_LOW(2) + 4),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1),
    ALLOW,
    DENY,
    ALLOW,
};

static int forbid_calls(void) {
    struct sock_fprog program = { sizeof(rules) / sizeof(*rules), (struct sock_filter *)rules };
    /* Side channels between its threads are the filter's own matter; the remedy costs speed. */
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) == 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0)
        return 0;
    return -errno;
}
#else
static int forbid_calls(void) { return -ENOSYS; }
#endif

int uh_confine(void) {
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return -errno;
    int error = drop_capabilities();
    return error ? error : forbid_calls();
}
