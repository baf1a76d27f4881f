#!/usr/bin/env bash
# Filters come, are replaced and go, twenty times one in C and twenty times one in Rust, while the
# guest runs fio with verification on ext4 behind a filter that changes data: it sees no
# error, and what it wrote is right when it is read again.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

rounds=20
xor=$(c_filter xor)
trace=$(c_filter trace)
throttle=$(rust_filter throttle)
truncate -s 256M "$scratch/a.img"
control=$scratch/control
serve --control "$control" \
    --disk "name=a,file=$scratch/a.img,socket=$scratch/a.sock,queues=2" \
    --filter "disk=a,file=$xor"

vm=$scratch/vm
"$rig/guest-ctl" start "$vm" --with fs --with fio --disk "$scratch/a.sock,num-queues=2"
trap '"$rig/guest-ctl" kill "$vm" || true; finish' EXIT

start_load "$vm" <<'GUEST'
new_ext4 /dev/vda /mnt/disk
options=(--directory=/mnt/disk --rw=randwrite --bs=4k-64k --size=24M --ioengine=psync --numjobs=2)
round=0
until [ -e /tmp/stop ]; do
    round=$((round + 1))
    verified_fio "${options[@]}" --do_verify=1 --end_fsync=1
done
echo 3 >/proc/sys/vm/drop_caches
verified_fio "${options[@]}" --verify_only
end_ext4 /dev/vda /mnt/disk
no_errors
echo "$round rounds of fio verified"
GUEST
sleep 3

chain() { "$bin/upcall" chain "$@" --control "$control" >>"$scratch/changes.log"; }
for ((i = 1; i <= rounds; i++)); do
    # A trial that time ends is one that requests went through, too.
    chain attach a "$trace" --name c --param "file=$scratch/trace" --trial-ms 300
    chain attach a "$throttle" --name rust --param iops=5000 --trial-ms 300
    chain replace a c --file "$trace" --trial-ms 300
    chain replace a rust --param iops=4000 --trial-ms 300
    chain detach a rust
    chain detach a c
done
end_load "$vm"

generation=$("$bin/upcall" show --json --control "$control" | python3 -c 'import json, sys; print(json.loads(sys.stdin.readline())["generation"])')
[ "$generation" = $((1 + 6 * rounds)) ] || die "generation $generation after $((6 * rounds)) changes"
[ "$(grep -c 'the guest waited for' "$scratch/changes.log")" = $((6 * rounds)) ] || die "not every change was made"
[ -s "$scratch/trace" ] || die "no request passed the filter that came"
"$rig/guest-ctl" stop "$vm"
stop_server
python3 "$top/filters/xor/unxor.py" "$scratch/a.img" "$scratch/a.plain"
e2fsck -f -n "$scratch/a.plain" || die "ext4, as an independent reader sees it"
echo "longest pause: $(sed -n 's/.*the guest waited for //p' "$scratch/changes.log" | sort -n | tail -n 1)"
echo "ok"
