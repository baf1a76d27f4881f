#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Undoes the filter xor on an image: unxor.py [--key KEY] IMAGE PLAIN

Written from the manual page, upcall-xor.7, not from the filter's code; tests compare both.
The same program changes a plain image into one that the filter reads: f undoes itself.
Zeroes stay holes in PLAIN.
"""

import argparse
import os
import struct
import sys

SECTOR = 512
CHUNK = 1 << 20
MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def fnv1a(key):
    value = 0xCBF29CE484222325
    for byte in key:
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def key_sector(seed, first_word):
    """The 64 key words of a sector, as one number."""
    words = []
    state = (seed + (first_word + 1) * GAMMA) & MASK
    for _ in range(SECTOR // 8):
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        words.append(z ^ (z >> 31))
        state = (state + GAMMA) & MASK
    return int.from_bytes(struct.pack("<64Q", *words), "little")


def change_sector(seed, offset, sector):
    data = int.from_bytes(sector, "little")
    key = key_sector(seed, offset // 8)
    if data == 0 or data == key:
        return sector
    return (data ^ key).to_bytes(SECTOR, "little")


def change_chunk(seed, offset, chunk):
    zero = bytes(SECTOR)
    parts = []
    for at in range(0, len(chunk), SECTOR):
        sector = chunk[at : at + SECTOR]
        parts.append(sector if sector == zero else change_sector(seed, offset + at, sector))
    return b"".join(parts)


def main():
    parser = argparse.ArgumentParser(description="Undoes the filter xor on an image.")
    parser.add_argument("--key", default="upcall", help="the filter's parameter (default: %(default)s)")
    parser.add_argument("image", help="what lies on the disk")
    parser.add_argument("plain", help="the file to write: what the guest sees")
    args = parser.parse_args()
    seed = fnv1a(os.fsencode(args.key))
    with open(args.image, "rb") as image, open(args.plain, "wb") as plain:
        size = image.seek(0, os.SEEK_END)
        image.seek(0)
        if size % SECTOR:
            sys.exit(f"{args.image}: {size} bytes are not a whole number of sectors")
        offset = 0
        while chunk := image.read(CHUNK):
            if chunk.count(0) != len(chunk):
                plain.seek(offset)
                plain.write(change_chunk(seed, offset, chunk))
            offset += len(chunk)
        plain.truncate(size)


if __name__ == "__main__":
    main()
