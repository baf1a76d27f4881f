#!/usr/bin/env bash
# A guest that reboots finds its disk as it left it, and the server serves on: firmware and
# kernel start and stop the device several times.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

trace=$(c_filter trace)
xor=$(c_filter xor)
truncate -s 128M "$scratch/disk.img"
serve --disk "name=root,file=$scratch/disk.img,socket=$scratch/d.sock,queues=2" \
    --filter "disk=root,file=$trace" --filter "disk=root,file=$xor"

vm=$scratch/vm
"$rig/guest-ctl" start "$vm" --reboot --with fs --disk "$scratch/d.sock,num-queues=2"
trap '"$rig/guest-ctl" kill "$vm" || true; finish' EXIT
exec_guest() { "$rig/guest-ctl" exec "$vm" -c "$1"; }
boots() { exec_guest 'cat /proc/sys/kernel/random/boot_id' | head -n 1; }

first=$(boots)
exec_guest 'set -e
    mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt/disk && mount /dev/vda /mnt/disk
    dd if=/dev/urandom of=/mnt/disk/file bs=1M count=16 status=none
    cd /mnt/disk && sha256sum file >sum && cd / && umount /mnt/disk'
# With requests in flight: what they wrote is not looked at, that the disk lives on is.
exec_guest '(dd if=/dev/vda of=/dev/null bs=64k >/dev/null 2>&1 </dev/null &)
    (sleep 0.5; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 </dev/null &'
sleep 3
"$rig/guest-ctl" wait "$vm" --timeout 90
second=$(boots)
[ "$first" != "$second" ] || die "the guest did not reboot"
exec_guest 'set -e
    mkdir -p /mnt/disk && mount /dev/vda /mnt/disk
    cd /mnt/disk && sha256sum -c -s sum && cd / && umount /mnt/disk
    e2fsck -f -n /dev/vda >/dev/null 2>&1 && echo "file system sound after the reboot"'
"$rig/guest-ctl" stop "$vm"
stop_server
echo "ok"
