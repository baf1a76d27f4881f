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

cat >"$scratch/load.sh" <<'GUEST'
set -e
rm -f /tmp/stop
mkfs.ext4 -q -F /dev/vda
mkdir -p /mnt/disk
mount /dev/vda /mnt/disk
round=0
until [ -e /tmp/stop ]; do
    round=$((round + 1))
    fio --name=chain --directory=/mnt/disk --rw=randwrite --bs=4k-64k --size=24M --ioengine=psync \
        --numjobs=2 --verify=crc32c --do_verify=1 --verify_fatal=1 --end_fsync=1 >/tmp/fio.log 2>&1 || {
        cat /tmp/fio.log
        exit 1
    }
done
echo 3 >/proc/sys/vm/drop_caches
fio --name=chain --directory=/mnt/disk --rw=randwrite --bs=4k-64k --size=24M --ioengine=psync \
    --numjobs=2 --verify=crc32c --verify_only --verify_fatal=1 >/tmp/fio.log 2>&1 || { cat /tmp/fio.log; exit 1; }
umount /mnt/disk
e2fsck -f -n /dev/vda >/tmp/fsck 2>&1 || { cat /tmp/fsck; exit 1; }
dmesg | grep -iE "i/o error|ext4-fs error|blocked for more" && exit 1
echo "$round rounds of fio verified"
GUEST
"$rig/guest-ctl" put "$vm" "$scratch/load.sh" /tmp/load.sh
"$rig/guest-ctl" exec "$vm" -c '(bash /tmp/load.sh >/tmp/load.log 2>&1; echo $? >/tmp/load.status) \
    </dev/null >/dev/null 2>&1 &'
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
"$rig/guest-ctl" exec "$vm" --timeout 200 -c 'touch /tmp/stop
    for ((i = 0; i < 1800; i++)); do [ -s /tmp/load.status ] && break; sleep 0.1; done
    cat /tmp/load.log; dmesg | tail -n 5; [ "$(cat /tmp/load.status)" = 0 ]' ||
    die "the guest's load failed"

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
