#!/usr/bin/env bash
# A guest that runs fio with verification on ext4, behind a filter that changes all data, moves
# five times between two QEMUs, forth and back, while one worker serves its disk to both. One
# migration is cancelled half way, and in one the worker is killed. The guest sees no error, and
# the image is right afterwards.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

moves=5
truncate -s 192M "$scratch/d.img"
serve --restart --restart-pause-ms 100 --log-level info \
    --disk "name=d,file=$scratch/d.img,socket=$scratch/d.sock,queues=2" \
    --filter "disk=d,file=$(c_filter trace)" --filter "disk=d,file=$(c_filter xor)"

start() { # VM [OPTION...]
    "$rig/guest-ctl" start "$1" "${@:2}" --with fs --with fio --memory 640M \
        --disk "$scratch/d.sock,num-queues=2"
}
here=$scratch/v0
start "$here"
end_all() {
    local status=$? vm
    for vm in "$scratch"/v?; do "$rig/guest-ctl" kill "$vm" || true; done
    set +e
    (exit "$status")
    finish
}
trap end_all EXIT

cat >"$scratch/load.sh" <<'GUEST'
set -e
mkfs.ext4 -q -F /dev/vda
mkdir -p /mnt/disk
mount /dev/vda /mnt/disk
round=0
until [ -e /tmp/stop ]; do
    round=$((round + 1))
    fio --name=load --filename=/mnt/disk/file --size=24M --io_size=24M --direct=1 \
        --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=512-64k --bs_unaligned=0 \
        --blockalign=512 --serialize_overlap=1 --fsync=64 --randseed="$round" \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --minimal >/tmp/fio.log 2>&1 ||
        { cat /tmp/fio.log; exit 1; }
    name=/mnt/disk/copy$((round % 4))
    dd if=/dev/urandom of="$name" bs=256k count=8 conv=fsync status=none
    sha256sum "$name" >"/tmp/sum$((round % 4))"
done
echo 3 >/proc/sys/vm/drop_caches
for sum in /tmp/sum?; do sha256sum -c -s "$sum"; done
umount /mnt/disk
e2fsck -f -n /dev/vda >/tmp/fsck 2>&1 || { cat /tmp/fsck; exit 1; }
dmesg | grep -iE "i/o error|ext4-fs error|blocked for more" && exit 1
echo "$round rounds verified"
GUEST
"$rig/guest-ctl" put "$here" "$scratch/load.sh" /tmp/load.sh
"$rig/guest-ctl" exec "$here" -c '(bash /tmp/load.sh >/tmp/load.log 2>&1; echo $? >/tmp/load.status) \
    </dev/null >/dev/null 2>&1 &'
sleep 3

# The load still runs.
runs() {
    "$rig/guest-ctl" exec "$here" -c '[ -e /tmp/load.status ] || exit 0
        cat /tmp/load.log; dmesg | tail -n 5; exit 1' || die "the guest's load has ended"
}

# move NUMBER [OPTION...]: to a new QEMU; prints what QEMU says of it.
move() {
    local there=$scratch/v$1
    start "$there" --incoming
    "$rig/guest-ctl" migrate "$here" "$there" --downtime 1000 --bandwidth 200000000 \
        --timeout 100 "${@:2}" >"$scratch/moved" || die "migration $1: $(tail -n 5 "$there/qemu.log")"
    cat "$scratch/moved"
}

for ((i = 1; i <= moves; i++)); do
    case $i in
    2)
        # The target is given up half way; the guest goes on where it was, and moves later.
        move 8 --cancel-at 40000000
        grep -q '"cancelled"' "$scratch/moved" || die "it was not cancelled"
        "$rig/guest-ctl" kill "$scratch/v8"
        runs
        move "$i"
        ;;
    4)
        # shellcheck disable=SC2016
        move "$i" --meanwhile "kill -KILL \$(cat /proc/$server/task/$server/children); sleep 1"
        ;;
    *) move "$i" ;;
    esac
    # The source is left as who moves leaves it: stopped, and then ended.
    "$rig/guest-ctl" stop "$here"
    here=$scratch/v$i
    runs
done

"$rig/guest-ctl" exec "$here" --timeout 120 -c 'touch /tmp/stop
    for ((i = 0; i < 1000; i++)); do [ -s /tmp/load.status ] && break; sleep 0.1; done
    cat /tmp/load.log; dmesg | tail -n 3; [ "$(cat /tmp/load.status)" = 0 ]' ||
    die "the guest's load failed"
"$rig/guest-ctl" stop "$here"
stop_server
logged=$(grep -c "writes to it are logged" "$scratch/serve.err") || true
[ "$logged" -gt "$moves" ] || die "only $logged migrations were logged"
[ "$(grep -c "died (signal 9)" "$scratch/serve.err")" = 1 ] || die "the worker was to die once"
python3 "$top/filters/xor/unxor.py" "$scratch/d.img" "$scratch/d.plain"
e2fsck -f -n "$scratch/d.plain" || die "ext4, as an independent reader sees it"
echo "ok"
