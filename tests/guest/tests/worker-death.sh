#!/usr/bin/env bash
# The worker is killed five times while the guest runs fio with verification on one disk and
# fills a file system on another, each behind filters: QEMU reconnects by itself, the guest sees
# no error, and the images are right afterwards.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

kills=5
xor=$(c_filter xor)
trace=$(c_filter trace)
throttle=$(rust_filter throttle)
truncate -s 96M "$scratch/a.img"
truncate -s 256M "$scratch/b.img"
serve --restart --restart-pause-ms 100 \
    --disk "name=a,file=$scratch/a.img,socket=$scratch/a.sock,queues=2" \
    --disk "name=b,file=$scratch/b.img,socket=$scratch/b.sock,queues=2" \
    --filter "disk=a,file=$throttle,param.iops=4000" \
    --filter "disk=b,file=$trace" --filter "disk=b,file=$xor"

vm=$scratch/vm
"$rig/guest-ctl" start "$vm" --with fs --with fio \
    --disk "$scratch/a.sock,num-queues=2" --disk "$scratch/b.sock,num-queues=2"
trap '"$rig/guest-ctl" kill "$vm" || true; finish' EXIT
"$rig/guest-ctl" put "$vm" "$rig/scenarios/fio-verify.sh" /tmp/fio-verify.sh

# Both loads at once, until told to stop; then what they left is looked at again.
start_load "$vm" <<'GUEST'
(
    until [ -e /tmp/stop ]; do bash /tmp/fio-verify.sh /dev/vda 32M 32 2 || exit 1; done
) >/tmp/verify.log 2>&1 &
fio=$!
new_ext4 /dev/vdb /mnt/disk
round=0
until [ -e /tmp/stop ]; do
    round=$((round + 1))
    random_file /mnt/disk/file "$round" 8 32
done
wait "$fio" || { cat /tmp/verify.log; exit 1; }
check_files
end_ext4 /dev/vdb /mnt/disk
no_errors
echo "$round files written, fio: $(wc -l </tmp/verify.log) rounds verified"
GUEST
for ((i = 1; i <= kills; i++)); do
    sleep $((3 + RANDOM % 3)).$((RANDOM % 1000))
    # shellcheck disable=SC2046
    kill -KILL $(cat "/proc/$server/task/$server/children")
done
sleep 4
end_load "$vm"
"$rig/guest-ctl" stop "$vm"
stop_server
deaths=$(grep -c "died (signal 9)" "$scratch/serve.err")
[ "$deaths" = "$kills" ] || die "$deaths deaths instead of $kills"
python3 "$top/filters/xor/unxor.py" "$scratch/b.img" "$scratch/b.plain"
e2fsck -f -n "$scratch/b.plain" || die "ext4, as an independent reader sees it"
stalls=$(sed -n 's/.*nobody served for \([0-9]*\) ms.*/\1/p' "$scratch/serve.err" | sort -n)
echo "ledger: {\"kind\":\"worker-kill-guest\",\"count\":$kills,\"faults\":$kills,\"stall_ms_max\":$(tail -n 1 <<<"$stalls"),\"seconds\":$SECONDS,\"result\":\"ok\"}"
echo "ok"
