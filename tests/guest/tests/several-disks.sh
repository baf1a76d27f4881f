#!/usr/bin/env bash
# Several disks of one worker, with and without filters, one of them read-only: each is its
# own in the guest, with the serial, size, queues and limits it was given.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

xor=$(c_filter xor)
truncate -s 32M "$scratch/plain.img" "$scratch/changed.img"
head -c 8M /dev/urandom >"$scratch/fixed.img"
fixed=$(md5sum <"$scratch/fixed.img" | cut -d ' ' -f 1)

serve --disk "name=plain,file=$scratch/plain.img,socket=$scratch/a.sock" \
    --disk "name=changed,file=$scratch/changed.img,socket=$scratch/b.sock,queues=4" \
    --disk "name=fixed,file=$scratch/fixed.img,socket=$scratch/c.sock,readonly=on" \
    --disk "name=memory,memory=16M,socket=$scratch/d.sock" \
    --filter "disk=changed,file=$xor"
guest --with fs --cpus 4 --timeout 120 \
    --disk "$scratch/a.sock" --disk "$scratch/b.sock,num-queues=4" --disk "$scratch/c.sock" \
    --disk "$scratch/d.sock" \
    --put "$rig/scenarios/discard.sh:/tmp/discard.sh" -c "
set -e
for disk in vda vdb vdc vdd; do
    echo \"\$disk \$(blockdev --getsize64 /dev/\$disk) ro=\$(blockdev --getro /dev/\$disk) serial=\$(cat /sys/block/\$disk/serial)\"
done
[ \$(blockdev --getro /dev/vdc) = 1 ]
[ \"\$(md5sum </dev/vdc | cut -d ' ' -f 1)\" = $fixed ]
if dd if=/dev/zero of=/dev/vdc bs=4k count=1 oflag=direct 2>/dev/null; then
    echo 'the read-only disk was written'
    exit 1
fi
[ \$(find /sys/block/vdb/mq -mindepth 1 -maxdepth 1 | wc -l) = 4 ]
[ \"\$(cat /sys/block/vda/queue/write_cache)\" = 'write back' ]
bash /tmp/discard.sh /dev/vda
bash /tmp/discard.sh /dev/vdb
bash /tmp/discard.sh /dev/vdd
md5sum </dev/vda | sed 's/^/vda: /'
md5sum </dev/vdb | sed 's/^/vdb: /'
" | tee "$scratch/guest.out"
stop_server

seen() { awk -v disk="$1:" '$1 == disk { print $2 }' "$scratch/guest.out"; }
[ "$(md5sum <"$scratch/fixed.img" | cut -d ' ' -f 1)" = "$fixed" ] || die "the read-only image changed"
[ "$(md5sum <"$scratch/plain.img" | cut -d ' ' -f 1)" = "$(seen vda)" ] || die "plain.img is not what the guest read"
python3 "$top/filters/xor/unxor.py" "$scratch/changed.img" "$scratch/changed.plain"
[ "$(md5sum <"$scratch/changed.plain" | cut -d ' ' -f 1)" = "$(seen vdb)" ] || die "changed.img, xor undone, is not what the guest read"
# 16 MiB written, 4 discarded, 4 zeroed: a hole is where the discard was.
[ "$(stat -c %b "$scratch/plain.img")" -lt $((13 * 2048)) ] || die "the discard freed nothing"
echo "ok"
