#!/usr/bin/env bash
# Makes small images for the fuzz targets to begin with: `fuzz/seeds.sh QEMU_IMG DIRECTORY`. Each target has its own folder.
# Those of LUKS, and encrypted ones, have the passphrase `abc`, which the targets know.
set -euo pipefail

[[ $# -eq 2 ]] || {
    printf 'usage: %s QEMU_IMG DIRECTORY\n' "$0" >&2
    exit 2
}
readonly TOOL=$1 INTO=$2
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# Text, zeroes and noise, 64 KiB each.
{
    head -c 64K < <(yes 'seed')
    head -c 64K /dev/zero
    awk 'BEGIN { srand(7); for (i = 0; i < 65536; i++) printf "%c", 1 + int(rand() * 126) }'
} >"$WORK/disk"

# seed TARGET NAME WORDS...: converts the disk; the words precede the names.
seed() {
    local target=$1 name=$2
    shift 2
    mkdir -p "$INTO/$target"
    "$TOOL" convert -t unsafe -f raw "$@" "$WORK/disk" "$INTO/$target/$name"
}

readonly SECRET=(--object secret,id=s,data=abc)

seed open_raw plain -O raw
seed open_qcow2 small -O qcow2 -o cluster_size=512
seed open_qcow2 old -O qcow2 -o cluster_size=1k,compat=0.10
seed open_qcow2 zlib -c -O qcow2 -o cluster_size=4k
seed open_qcow2 zstd -c -O qcow2 -o cluster_size=4k,compression_type=zstd
seed open_qcow2 sub -O qcow2 -o cluster_size=16k,extended_l2=on
seed open_qcow2 aes "${SECRET[@]}" -O qcow2 -o cluster_size=512,encryption=on,encrypt.key-secret=s
"$TOOL" snapshot -c one "$INTO/open_qcow2/small"
"$TOOL" bitmap --add "$INTO/open_qcow2/zstd" bitmap
"$TOOL" create -q -u -f qcow2 -F raw -b disk -o cluster_size=512 "$INTO/open_qcow2/overlay" 64K
seed open_qcow plain -O qcow
seed open_qcow zlib -c -O qcow
seed open_qed plain -O qed -o cluster_size=4k,table_size=1
seed open_vdi dynamic -O vdi
seed open_vdi static -O vdi -o static=on
seed open_vpc dynamic -O vpc -o force_size=on
seed open_vpc fixed -O vpc -o subformat=fixed,force_size=on
seed open_vmdk sparse -O vmdk
seed open_vmdk stream -O vmdk -o subformat=streamOptimized
seed open_parallels plain -O parallels
seed open_luks plain "${SECRET[@]}" -O luks -o key-secret=s,iter-time=1
