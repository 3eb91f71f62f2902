# shellcheck shell=bash
# A file system image with files of this machine in it, for scripts that take it through formats: real data, real holes.
# Sourced by them; `$work` is their directory.

# Where the files of the image come from; it takes them in the order of their names until it is 70 % full.
readonly SOURCE=/usr

die() {
    printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2
    exit 2
}

# Every command of either program goes through here: its output is shown only when it fails.
run() {
    if ! "$@" >"$work/log" 2>&1; then
        printf '  failed: %s\n' "$*"
        sed 's/^/    /; 5q' "$work/log"
        return 1
    fi
}

# The files to put into the image, one a line and relative to the root: as many as fit into the number of bytes given.
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

# The number of bytes that a size stands for.
bytes_of() {
    local bytes
    bytes=$(numfmt --from=iec "$1") || die "invalid size '$1'"
    ((bytes >= 32 << 20 && bytes % (1 << 20) == 0)) || die "the size is in whole MiB, 32M or more"
    printf '%s\n' "$bytes"
}

# programs OURS STOCK: finds the programs, as `$ours` and `$stock`, and what making an image takes.
programs() {
    PATH=$PATH:/usr/sbin:/sbin
    command -v mke2fs >/dev/null || die "mke2fs is not installed (package e2fsprogs)"
    ours=$(command -v "$1") || die "cannot run '$1'"
    stock=$(command -v "$2") || die "cannot run '$2'"
}

# The directory of this run, below the one given, as `$work`; it goes when the script ends.
work_below() {
    work=$(mktemp -d "$1/$(basename "$0" .sh).XXXXXX")
    trap 'rm -rf "$work"' EXIT
}
