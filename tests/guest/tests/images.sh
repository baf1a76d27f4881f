#!/usr/bin/env bash
# qcow2 and each kind of VMDK that can be written, each behind trace and xor: a file system on
# qcow2, fio's verified load on all of them. The images are sound afterwards, and hold, xor
# undone, what the guest read; a reader that is not ours sees the same in a raw copy.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

trace=$(c_filter trace)
xor=$(c_filter xor)

kinds=(qcow2 monolithicSparse monolithicFlat twoGbMaxExtentSparse twoGbMaxExtentFlat)
format() { if [ "$1" = qcow2 ]; then echo qcow2; else echo vmdk; fi; }
arguments=()
disks=()
for kind in "${kinds[@]}"; do
    image=$scratch/$kind.img
    options=()
    [ "$kind" = qcow2 ] || options=(-o "subformat=$kind")
    qemu-img create -q -f "$(format "$kind")" "${options[@]}" "$image" 96M
    words="name=$kind,file=$image,format=$(format "$kind"),socket=$scratch/$kind.sock,queues=2"
    [ "$kind" = qcow2 ] || words+=",extents=$scratch"
    arguments+=(--disk "$words" --filter "disk=$kind,file=$trace" --filter "disk=$kind,file=$xor")
    disks+=(--disk "$scratch/$kind.sock,num-queues=2")
done
serve "${arguments[@]}"
guest --timeout 240 "${disks[@]}" \
    --put "$rig/scenarios/fs-cycle.sh:/tmp/fs-cycle.sh" \
    --put "$rig/scenarios/fio-verify.sh:/tmp/fio-verify.sh" -c '
set -e
bash /tmp/fs-cycle.sh /dev/vda ext4 16
for disk in vda vdb vdc vdd vde; do
    bash /tmp/fio-verify.sh /dev/$disk 8M
    echo "md5 $disk $(md5sum </dev/$disk | cut -d " " -f 1)"
done' | tee "$scratch/guest.out"
stop_server

letters=(a b c d e)
for index in "${!kinds[@]}"; do
    kind=${kinds[$index]}
    image=$scratch/$kind.img
    # 3: space that nothing uses, and nothing worse.
    status=0
    qemu-img check -q -f "$(format "$kind")" "$image" || status=$?
    [ "$status" = 0 ] || [ "$status" = 3 ] || die "$kind: qemu-img check: $status"
    qemu-img convert -f "$(format "$kind")" -O raw "$image" "$scratch/copy.raw"
    qemu-img compare -q -f "$(format "$kind")" -F raw "$image" "$scratch/copy.raw" ||
        die "$kind: the image is not its copy"
    python3 "$top/filters/xor/unxor.py" "$scratch/copy.raw" "$scratch/plain.raw"
    found=$(md5sum <"$scratch/plain.raw" | cut -d ' ' -f 1)
    expected=$(awk -v disk="vd${letters[$index]}" '$1 == "md5" && $2 == disk { print $3 }' "$scratch/guest.out")
    [ -n "$expected" ] || die "$kind: the guest gave no checksum"
    [ "$found" = "$expected" ] || die "$kind: the image, xor undone, is not what the guest read"
    echo "ok: $kind"
done
