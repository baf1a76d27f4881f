#!/usr/bin/env bash
# A raw disk grows while its file system is mounted: the guest sees the new size, the file
# system is resized online and is sound. Likewise when it grows while the guest is stopped, and
# when it grew while no worker ran: QEMU reads the size only when it is told to, once the device
# runs again.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

image=$scratch/disk.img
truncate -s 128M "$image"
serve --restart --disk "name=root,file=$image,socket=$scratch/d.sock"

vm=$scratch/vm
"$rig/guest-ctl" start "$vm" --with fs --disk "$scratch/d.sock"
trap '"$rig/guest-ctl" kill "$vm" || true; finish' EXIT
exec_guest() { "$rig/guest-ctl" exec "$vm" -c "$1"; }

# fill NAME MIB: a file of random data in the guest's file system, and its checksum.
fill() {
    exec_guest "set -e; cd /mnt/disk
        dd if=/dev/urandom of=$1 bs=1M count=$2 status=none; sha256sum $1 >>sums; sync"
}

# expect_size MIB: the guest's disk has that size, soon.
expect_size() {
    exec_guest "i=0
        until [ \$(blockdev --getsize64 /dev/vda) = $(($1 << 20)) ]; do
            i=\$((i + 1)); [ \$i -lt 100 ] || { cat /proc/partitions; exit 1; }; sleep 0.1
        done" || die "the guest does not see $1 MiB"
    echo "the guest sees $1 MiB"
}

resize() { exec_guest 'resize2fs /dev/vda 2>&1' || die "resize2fs"; }

exec_guest 'set -e; mkfs.ext4 -q -F /dev/vda; mkdir -p /mnt/disk; mount /dev/vda /mnt/disk'
fill one 60

truncate -s 256M "$image"
kill -HUP "$server"
expect_size 256
resize
fill two 100

"$rig/guest-ctl" qmp "$vm" stop >/dev/null
truncate -s 384M "$image"
kill -HUP "$server"
sleep 1
"$rig/guest-ctl" qmp "$vm" cont >/dev/null
expect_size 384
resize
fill three 100

# No worker, and no SIGHUP: the next one finds the size out by itself.
truncate -s 512M "$image"
# shellcheck disable=SC2046
kill -KILL $(cat "/proc/$server/task/$server/children")
expect_size 512
resize
fill four 100

exec_guest 'set -e; cd /mnt/disk; sha256sum -c sums; cd /; umount /mnt/disk
    e2fsck -f -n /dev/vda >/tmp/fsck 2>&1 || { cat /tmp/fsck; exit 1; }
    ! dmesg | grep -iE "i/o error|ext4-fs error"'
exec_guest 'dmesg | grep "capacity change"' || die "no capacity change in the guest's log"
"$rig/guest-ctl" stop "$vm"
stop_server
e2fsck -f -n "$image" || die "ext4, as an independent reader sees it"
[ "$(grep -c "grown from" "$scratch/serve.err")" = 2 ] || die "the log does not say it"
echo "ok"
