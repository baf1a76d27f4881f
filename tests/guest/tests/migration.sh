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

start_load "$here" <<'GUEST'
new_ext4 /dev/vda /mnt/disk
round=0
until [ -e /tmp/stop ]; do
    round=$((round + 1))
    mixed_fio /mnt/disk/file "$round"
    random_file /mnt/disk/copy "$round" 4 8
done
check_files
end_ext4 /dev/vda /mnt/disk
no_errors
echo "$round rounds verified"
GUEST
sleep 3

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
        expect_load "$here"
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
    expect_load "$here"
done

end_load "$here"
"$rig/guest-ctl" stop "$here"
stop_server
logged=$(grep -c "writes to it are logged" "$scratch/serve.err") || true
[ "$logged" -gt "$moves" ] || die "only $logged migrations were logged"
[ "$(grep -c "died (signal 9)" "$scratch/serve.err")" = 1 ] || die "the worker was to die once"
python3 "$top/filters/xor/unxor.py" "$scratch/d.img" "$scratch/d.plain"
e2fsck -f -n "$scratch/d.plain" || die "ext4, as an independent reader sees it"
echo "ok"
