# shellcheck shell=bash
# Creates a file system image with files of this machine, for scripts that convert it: it has real data and real holes.
# The scripts source this file; `$work` is their directory.

# The directory of the files in the image. They are taken in the order of their names until the image is 70 % full.
readonly SOURCE=/usr

die() {
    printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2
    exit 2
}

# Runs a command of either program. Its output is shown only if it fails.
run() {
    if ! "$@" >"$work/log" 2>&1; then
        printf '  failed: %s\n' "$*"
        sed 's/^/    /; 5q' "$work/log"
        return 1
    fi
}

# Prints the files of the image, one per line and relative to the root: as many as fit into the given number of bytes.
choose_files() {
    LC_ALL=C find "$SOURCE" -xdev -type f -readable -printf '%p\t%s\n' | LC_ALL=C sort |
        LC_ALL=C awk -F '\t' -v budget="$1" '
            { need = int(($2 + 4095) / 4096) * 4096 + 512 }
            NF == 2 && need <= budget { budget -= need; print substr($1, 2) }'
}

make_file_system() {
    local image=$1 size=$2 staging=$work/files
    mkdir "$staging"
    choose_files $((size * 7 / 10)) >"$work/list"
    tar -C / -cf - --verbatim-files-from -T "$work/list" | tar -C "$staging" -xf -
    local inodes
    inodes=$(find "$staging" | wc -l)
    truncate -s "$size" "$image"
    mke2fs -q -F -t ext4 -b 4096 -m 0 -N $((inodes + inodes / 8 + 64)) -d "$staging" "$image" ||
        die "mke2fs could not make the image"
    rm -rf "$staging"
}

# Prints a size as a number of bytes.
bytes_of() {
    local bytes
    bytes=$(numfmt --from=iec "$1") || die "invalid size '$1'"
    ((bytes >= 32 << 20 && bytes % (1 << 20) == 0)) || die "the size is in whole MiB, 32M or more"
    printf '%s\n' "$bytes"
}

# programs OURS STOCK: finds the programs, as `$ours` and `$stock`, and mke2fs.
programs() {
    PATH=$PATH:/usr/sbin:/sbin
    command -v mke2fs >/dev/null || die "mke2fs is not installed (package e2fsprogs)"
    ours=$(command -v "$1") || die "cannot run '$1'"
    stock=$(command -v "$2") || die "cannot run '$2'"
}

# Creates the directory of this run in the given one, as `$work`. It is removed when the script ends.
work_below() {
    work=$(mktemp -d "$1/$(basename "$0" .sh).XXXXXX")
    trap 'rm -rf "$work"' EXIT
}
