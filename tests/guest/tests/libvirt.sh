#!/usr/bin/env bash
# What docs/libvirt.md says, done: a guest of libvirt's with the disk and the hook from there is
# refused while QEMU's user may not reach its socket, started when it may, and migrated live
# between two hosts (two libvirtds, each with files of its own, and a worker each on the same two
# images, one raw and one qcow2), there and back, while it verifies what it writes.
# shellcheck source=tests/guest/tests/lib.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.bash"

[ "$(id -u)" = 0 ] || die "libvirtd needs root"
"$top/scripts/deps" --libvirt
page=$top/docs/libvirt.md
chmod 755 "$scratch"

# The code block of the page that holds a text.
block() {
    python3 - "$page" "$1" <<'PY'
import re
import sys
blocks = re.findall(r"^```\w+\n(.*?)^```", open(sys.argv[1]).read(), re.M | re.S)
sys.stdout.write(next(block for block in blocks if sys.argv[2] in block))
PY
}

# ---------------------------------------------------------------------- two hosts

own=(/etc/libvirt /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
    /etc/upcall /run/upcall /var/log/upcall)
both=(/var/lib/upcall /usr/lib/upcall)
made=()
for folder in "${own[@]}" "${both[@]}"; do
    [ -d "$folder" ] || { mkdir -p "$folder" && made+=("$folder"); }
done
daemons=()
declare -A uri
end_all() {
    local status=$? name
    for name in a b; do
        virsh -q -c "${uri[$name]:-none}" destroy vm1 >/dev/null 2>&1 || true
        if [ "$status" != 0 ]; then
            tail -n 15 "$scratch/$name/var/log/upcall/vm1.log" || true
            tail -n 5 "$scratch/$name/libvirtd.log" "$scratch/$name/var/log/libvirt/qemu/vm1.log" || true
        fi
        [ ! -e "$scratch/$name/run/upcall/vm1.pid" ] ||
            kill "$(cat "$scratch/$name/run/upcall/vm1.pid")" 2>/dev/null || true
    done
    [ "${#daemons[@]}" = 0 ] || kill "${daemons[@]}" 2>/dev/null || true
    sleep 1
    [ "${#made[@]}" = 0 ] || rmdir "${made[@]}" 2>/dev/null || true
    set +e
    (exit "$status")
    finish
}
trap end_all EXIT

mkdir -p "$scratch/both/var/lib/upcall" "$scratch/both/usr/lib/upcall"
cp "$bin/xor-64.so" "$scratch/both/usr/lib/upcall/"
truncate -s 192M "$scratch/both/var/lib/upcall/vm1.img"
qemu-img create -q -f qcow2 "$scratch/both/var/lib/upcall/vm1-data.qcow2" 192M

host() { # NAME NUMBER
    local root=$scratch/$1 folder
    for folder in "${own[@]}"; do mkdir -p "$root$folder"; done
    cp -a /etc/libvirt/. "$root/etc/libvirt/"
    printf '%s\n' 'stdio_handler = "file"' 'security_driver = "none"' 'namespaces = []' \
        'dynamic_ownership = 0' 'remember_owner = 0' >"$root/etc/libvirt/qemu.conf"
    echo "host_uuid = \"00000000-0000-4000-8000-00000000000$2\"" >"$root/etc/libvirt/libvirtd.conf"
    mkdir -p "$root/etc/upcall/vms"
    block 'file = "/var/lib/upcall/vm1.img"' >"$root/etc/upcall/vms/vm1.toml"
    # The agent's socket and the console are made there by QEMU.
    chmod 777 "$root/run/upcall"
    # shellcheck disable=SC2016
    OWN=${own[*]} BOTH=${both[*]} ROOT=$root ALL=$scratch/both COMMAND=$(block hooks/qemu) TOP=$top \
        PATH=$bin:$PATH unshare -m --propagation private bash -ec '
        for folder in $OWN; do mount --bind "$ROOT$folder" "$folder"; done
        for folder in $BOTH; do mount --bind "$ALL$folder" "$folder"; done
        (cd "$TOP" && eval "$COMMAND")
        exec libvirtd --timeout 0 --pid-file /run/libvirt/libvirtd.pid' </dev/null >"$root/libvirtd.log" 2>&1 &
    daemons+=($!)
    uri[$1]="qemu+unix:///system?socket=$root/run/libvirt/libvirt-sock"
    local i
    for ((i = 0; i < 100; i++)); do
        virsh -q -c "${uri[$1]}" list >/dev/null 2>&1 && return
        sleep 0.2
    done
    tail -n 5 "$root/libvirtd.log"
    die "libvirtd of $1 does not start"
}
host a 1
host b 2

# ----------------------------------------------------------------------- the guest

PYTHONPATH=$rig python3 - "$scratch" <<'PY'
import os
import shutil
import sys
import guestlib
image = guestlib.image_directory()
shutil.copy(os.path.join(image, "vmlinuz"), sys.argv[1])
guestlib.make_initrd(image, ("fs", "fio"), os.path.join(sys.argv[1], "initrd"))
PY
chmod 644 "$scratch/vmlinuz" "$scratch/initrd"
cat >"$scratch/vm1.xml" <<XML
<domain type='qemu'>
  <name>vm1</name>
  <memory unit='MiB'>640</memory>
  $(block memoryBacking)
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>$scratch/vmlinuz</kernel>
    <initrd>$scratch/initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 oops=panic nokaslr mitigations=off random.trust_cpu=on audit=0</cmdline>
  </os>
  <cpu mode='maximum'/>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    $(block "type='vhostuser'")
    <serial type='file'><source path='/run/upcall/console.log'/></serial>
    <channel type='unix'>
      <source mode='bind' path='/run/upcall/agent.sock'/>
      <target type='virtio' name='rig.agent'/>
    </channel>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='none'/>
  </devices>
</domain>
XML
for name in a b; do
    mkdir "$scratch/vm-$name"
    echo '{}' >"$scratch/vm-$name/guest.json"
    ln -s "$scratch/$name/run/upcall/agent.sock" "$scratch/vm-$name/agent.sock"
done

virsh -q -c "${uri[a]}" define "$scratch/vm1.xml"
# QEMU's user may not reach the socket: said at once, where QEMU would try for ever.
chmod 700 "$scratch/a/run/upcall"
status=0
timeout 60 virsh -q -c "${uri[a]}" start vm1 >"$scratch/refused" 2>&1 || status=$?
cat "$scratch/refused"
[ "$status" = 1 ] || die "virsh start was to fail, and ended with status $status"
grep -q "may not connect to it" "$scratch/refused" || die "it does not say why"
chmod 777 "$scratch/a/run/upcall"

timeout 60 virsh -q -c "${uri[a]}" start vm1 || die "virsh start"
"$rig/guest-ctl" wait "$scratch/vm-a" --timeout 120
start_load "$scratch/vm-a" <<'GUEST'
new_ext4 /dev/vda /mnt/raw
new_ext4 /dev/vdb /mnt/qcow2
round=0
until [ -e /tmp/stop ]; do
    round=$((round + 1))
    mixed_fio /mnt/raw/file "$round"
    mixed_fio /mnt/qcow2/file "$round"
done
end_ext4 /dev/vda /mnt/raw
end_ext4 /dev/vdb /mnt/qcow2
no_errors
echo "$round rounds verified"
GUEST
sleep 3

migrate() { # FROM TO
    timeout 120 virsh -q -c "${uri[$1]}" migrate --live --migrateuri tcp://127.0.0.1 vm1 "${uri[$2]}" ||
        die "the migration from $1 to $2"
    expect_load "$scratch/vm-$2"
    for disk in root data; do
        grep -q "disk $disk: given up" "$scratch/$1/var/log/upcall/vm1.log" ||
            die "$1 did not give the disk $disk up"
    done
    grep -q "writes to it are logged" "$scratch/$1/var/log/upcall/vm1.log" || die "nothing was logged"
    [ ! -e "$scratch/$1/run/upcall/vm1.pid" ] || die "the worker of $1 was not ended"
    [ -e "$scratch/$2/run/upcall/vm1.pid" ] || die "$2 has no worker"
}
migrate a b
sleep 2
migrate b a

end_load "$scratch/vm-a"
virsh -q -c "${uri[a]}" destroy vm1
[ ! -e "$scratch/a/run/upcall/vm1.pid" ] || die "the worker was not ended"
data=$scratch/both/var/lib/upcall/vm1-data.qcow2
qemu-img check -q -f qcow2 "$data" || die "the qcow2 image is not sound"
qemu-img convert -f qcow2 -O raw "$data" "$scratch/data.img"
for image in "$scratch/both/var/lib/upcall/vm1.img" "$scratch/data.img"; do
    python3 "$top/filters/xor/unxor.py" "$image" "$scratch/plain"
    e2fsck -f -n "$scratch/plain" || die "ext4 on $image, as an independent reader sees it"
done
echo "ok"
