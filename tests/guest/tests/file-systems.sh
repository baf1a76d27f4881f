#!/usr/bin/env bash
# ext4 and xfs made, filled, read back after a second mount, trimmed, unmounted and checked,
# through trace, xor and throttle; discards free the image's blocks. The images, xor undone,
# are sound file systems to a reader that is not the guest.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

trace=$(c_filter trace)
xor=$(c_filter xor)
throttle=$(rust_filter throttle)

truncate -s 512M "$scratch/a.img" "$scratch/b.img"
arguments=()
for disk in a b; do
    arguments+=(--disk "name=$disk,file=$scratch/$disk.img,socket=$scratch/$disk.sock,queues=2"
        --filter "disk=$disk,file=$trace"
        --filter "disk=$disk,file=$xor"
        --filter "disk=$disk,file=$throttle,param.iops=20000")
done
serve "${arguments[@]}"
guest --with fs --timeout 240 \
    --disk "$scratch/a.sock,num-queues=2" --disk "$scratch/b.sock,num-queues=2" \
    --put "$rig/scenarios/fs-cycle.sh:/tmp/fs-cycle.sh" \
    -c 'set -e; bash /tmp/fs-cycle.sh /dev/vda ext4 32; bash /tmp/fs-cycle.sh /dev/vdb xfs 32'
stop_server

for disk in a b; do
    python3 "$top/filters/xor/unxor.py" "$scratch/$disk.img" "$scratch/$disk.plain"
done
e2fsck -f -n "$scratch/a.plain" || die "ext4, as an independent reader sees it"
xfs_repair -n -f "$scratch/b.plain" || die "xfs, as an independent reader sees it"
echo "ok"
