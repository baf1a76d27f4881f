#!/bin/bash
# Verified mixes at several block sizes and depths, then the checksum of the whole disk.
# DESTROYS the disk.
# Usage: fio-mixes.sh DEVICE JOBS
set -eu
device=$1 jobs=$2
size=$((96 / jobs))M

# One fio for all: starting programs is slow in an emulated guest. Each stanza waits for the
# one before it and has a part of the disk to itself, per job.
cat >/tmp/mixes.fio <<EOF
[global]
filename=$device
direct=1
ioengine=libaio
size=$size
offset_increment=$size
numjobs=$jobs
verify=crc32c
verify_fatal=1
do_verify=1
randrepeat=0
group_reporting
stonewall
[random-512-deep]
rw=randrw
bs=512
iodepth=32
io_size=$((4096 / jobs))k
[random-4k]
rw=randrw
bs=4k
iodepth=8
io_size=$((24576 / jobs))k
[random-mixed-sizes]
rw=randwrite
bssplit=512/30:4k/30:64k/30:256k/10
serialize_overlap=1
iodepth=16
io_size=$((49152 / jobs))k
fsync=64
[sequential-64k-shallow]
rw=rw
bs=64k
iodepth=1
io_size=$((49152 / jobs))k
[sequential-1m-deep]
rw=write
bs=1M
iodepth=8
io_size=$((96 / jobs))M
EOF
fio /tmp/mixes.fio >/tmp/mixes.out 2>&1 || {
    tail -n 60 /tmp/mixes.out
    exit 1
}
grep -E '^(random|sequential)-' /tmp/mixes.out | head -n 5
echo 3 >/proc/sys/vm/drop_caches
# Not SHA-256: an emulated processor takes a minute for it.
echo "md5 $(md5sum <"$device" | cut -d ' ' -f 1)"
