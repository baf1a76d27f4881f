#!/usr/bin/env bash
# fio in the guest, its data verified by checksum: random and sequential mixes at several
# block sizes and queue depths, on 1 and on 4 queues, through trace, xor and throttle; then
# the image, xor undone, is what the guest read.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

trace=$(c_filter trace)
xor=$(c_filter xor)
throttle=$(rust_filter throttle)

for queues in 1 4; do
    image=$scratch/disk$queues.img
    truncate -s 128M "$image"
    serve --disk "name=root,file=$image,socket=$scratch/d.sock,queues=$queues" \
        --filter "disk=root,file=$trace" \
        --filter "disk=root,file=$xor" \
        --filter "disk=root,file=$throttle,param.iops=20000"
    guest --with fio --cpus "$queues" --timeout 240 \
        --disk "$scratch/d.sock,num-queues=$queues" \
        "$rig/scenarios/fio-mixes.sh" /dev/vda "$queues" | tee "$scratch/guest.out"
    stop_server
    expected=$(awk '$1 == "md5" { print $2 }' "$scratch/guest.out")
    [ -n "$expected" ] || die "the guest gave no checksum"
    python3 "$top/filters/xor/unxor.py" "$image" "$scratch/plain.img"
    found=$(md5sum "$scratch/plain.img" | cut -d ' ' -f 1)
    [ "$found" = "$expected" ] || die "$queues queues: the image, xor undone, is not what the guest read"
    cmp -s "$image" "$scratch/plain.img" && die "the image is plain: xor did nothing"
    echo "ok: $queues queues"
done
