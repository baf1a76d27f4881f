# shellcheck shell=bash
# For what start_load (lib.bash) runs in the guest: it is put before it.
set -e
rm -f /tmp/stop

# DEVICE FOLDER: a new file system there.
new_ext4() {
    mkfs.ext4 -q -F "$1"
    mkdir -p "$2"
    mount "$1" "$2"
}

# DEVICE FOLDER: it is taken away, and sound.
end_ext4() {
    umount "$2"
    e2fsck -f -n "$1" >/tmp/fsck 2>&1 || { cat /tmp/fsck; exit 1; }
}

# OPTION...: fio, which reads again what it wrote.
verified_fio() {
    fio --name=load --verify=crc32c --verify_fatal=1 "$@" >/tmp/fio.log 2>&1 ||
        { cat /tmp/fio.log; exit 1; }
}

# FILE ROUND: writes of all sizes, with flushes, past the page cache.
mixed_fio() {
    verified_fio --filename="$1" --randseed="$2" --size=24M --io_size=24M --direct=1 \
        --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=512-64k --bs_unaligned=0 \
        --blockalign=512 --serialize_overlap=1 --fsync=64 --do_verify=1 --minimal
}

# NAME ROUND COUNT BLOCKS: a file of so many blocks of 256 KiB takes the place of the one of COUNT
# rounds before; /tmp/sum* know what it has.
random_file() {
    local number=$(($2 % $3))
    dd if=/dev/urandom of="$1$number" bs=256k count="$4" conv=fsync status=none
    sha256sum "$1$number" >"/tmp/sum$number"
}

# All such files are as they were written.
check_files() {
    echo 3 >/proc/sys/vm/drop_caches
    for sum in /tmp/sum?; do sha256sum -c -s "$sum"; done
}

# The kernel has complained of nothing.
no_errors() {
    if dmesg | grep -iE "i/o error|ext4-fs error|blocked for more"; then exit 1; fi
}
