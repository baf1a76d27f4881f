#!/usr/bin/env bash
# A guest whose root file system is on a qcow2 image, behind trace and xor. The image is filled
# over NBD, through the same filters; the guest boots from it, loads its programs from there,
# works on it, and is booted again. Afterwards the image is sound, its file system, too, and what
# the guest wrote is in it.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

chain() { echo "--filter disk=root,file=$(c_filter trace) --filter disk=root,file=$(c_filter xor)"; }
disk="name=root,file=$scratch/root.qcow2,format=qcow2"

# The root file system: what the initramfs would be, with a mark.
image=$("$rig/build-guest")
mkdir "$scratch/root"
for segment in base fs fio; do
    (cd "$scratch/root" && cpio --quiet -idmu <"$image/$segment.cpio")
done
touch "$scratch/root/rig/on-disk"
truncate -s 256M "$scratch/root.raw"
mke2fs -q -F -t ext4 -E root_owner=0:0 -d "$scratch/root" "$scratch/root.raw"
qemu-img create -q -f qcow2 "$scratch/root.qcow2" 256M
# shellcheck disable=SC2046
serve --disk "$disk,nbd=unix:$scratch/nbd.sock" $(chain)
nbdcopy --flush "$scratch/root.raw" "nbd+unix:///root?socket=$scratch/nbd.sock"
stop_server

# shellcheck disable=SC2046
serve --disk "$disk,socket=$scratch/d.sock,queues=2" $(chain)
boot() { # SCRIPT
    guest --timeout 240 --with base --append rig.root=/dev/vda \
        --disk "$scratch/d.sock,num-queues=2" -c "$1"
}
# To the end: emergency remount, so that the file system is clean.
boot 'set -e
    [ -e /rig/on-disk ]
    grep -q "^/dev/[a-z]* / ext4 rw" /proc/mounts
    fio --name=root --directory=/var/tmp --rw=randrw --bs=4k --size=8M --ioengine=psync \
        --verify=crc32c --verify_fatal=1 --fsync=16 --output-format=terse >/dev/null
    rm -f /var/tmp/root.*
    dd if=/dev/urandom of=/root/kept bs=64k count=64 status=none
    echo "sum $(sha256sum </root/kept | cut -d " " -f 1)"
    sync; echo u >/proc/sysrq-trigger; sleep 1' | tee "$scratch/first.out"
boot 'set -e
    [ -e /rig/on-disk ]
    echo "sum $(sha256sum </root/kept | cut -d " " -f 1)"
    sync; echo u >/proc/sysrq-trigger; sleep 1' | tee "$scratch/second.out"
stop_server

sum() { awk '$1 == "sum" { print $2 }' "$1"; }
expected=$(sum "$scratch/first.out")
[ -n "$expected" ] || die "the guest gave no checksum"
[ "$(sum "$scratch/second.out")" = "$expected" ] || die "the second boot reads something else"
status=0
qemu-img check -q -f qcow2 "$scratch/root.qcow2" || status=$?
# 3: space that nothing uses, and nothing worse.
[ "$status" = 0 ] || [ "$status" = 3 ] || die "qemu-img check: $status"
qemu-img convert -f qcow2 -O raw "$scratch/root.qcow2" "$scratch/copy.raw"
python3 "$top/filters/xor/unxor.py" "$scratch/copy.raw" "$scratch/plain.raw"
e2fsck -f -n "$scratch/plain.raw" >/dev/null || die "the file system is not sound"
found=$(debugfs -R 'cat /root/kept' "$scratch/plain.raw" 2>/dev/null | sha256sum | cut -d ' ' -f 1)
[ "$found" = "$expected" ] || die "the image does not have what the guest wrote"
echo ok
