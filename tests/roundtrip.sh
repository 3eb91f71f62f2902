#!/usr/bin/env bash
# Converts a real file system image to every form of qcow2 and back, with two programs that must agree.
#
#   tests/roundtrip.sh [--size 1G] [--work DIR] OURS STOCK
#
# Each form is written by OURS, checked and compared by STOCK, and read back by OURS; then written by STOCK, checked,
# compared and read back by OURS. The result must equal the file system image byte by byte (cmp).
# Prints a line for each form and direction, and exits with 1 if any failed.
set -euo pipefail

# name | -c or nothing | creation options
# The forms "backing" and "data_file…" have a backing or a data file too.
readonly FORMS='
default               |    |
zlib                  | -c | compression_type=zlib
zstd                  | -c | compression_type=zstd
cluster_size=512      |    | cluster_size=512
cluster_size=2M       |    | cluster_size=2M
extended_l2           |    | extended_l2=on
refcount_bits=1       |    | refcount_bits=1
refcount_bits=64      |    | refcount_bits=64
compat=0.10           |    | compat=0.10
data_file             |    |
data_file_raw         |    | data_file_raw=on
backing               |    |
'
# shellcheck source=tests/real_image.sh
source "$(dirname "${BASH_SOURCE[0]}")/real_image.sh"

usage() {
    sed -n 's/^# \{0,1\}//; 2,8p' "$0"
}

# Creates a backing image with the first half of the image and other data in the second half.
make_backing() {
    local image=$1 size=$2 half=$(($2 / 2))
    cp --sparse=always "$image" "$work/backing.raw"
    dd if="$image" of="$work/backing.raw" bs=1M skip=1 seek=$((half >> 20)) count=$(((size - half) / 2 >> 20)) \
        conv=notrunc status=none
    run "$stock" convert -f raw -O qcow2 "$work/backing.raw" "$work/backing.qcow2"
    rm "$work/backing.raw"
}

# write PROGRAM NAME COMPRESS OPTIONS: creates $image of this form from $source.
write() {
    local program=$1 name=$2 compress=$3 options=$4
    local -a arguments=(convert -f raw -O qcow2)
    case $name in
        data_file*) options="data_file=$work/data.raw${options:+,$options}" ;;
        backing) arguments+=(-B "$work/backing.qcow2" -F qcow2) ;;
    esac
    [[ -z $compress ]] || arguments+=("$compress")
    [[ -z $options ]] || arguments+=(-o "$options")
    run "$program" "${arguments[@]}" "$source" "$image"
}

# read_back: OURS converts the image back to raw, which must equal the source.
read_back() {
    run "$ours" convert -f qcow2 -O raw "$image" "$work/back.raw" &&
        run cmp "$source" "$work/back.raw"
}

# agree PROGRAM: PROGRAM checks the image and compares it with the source.
agree() {
    run "$1" check -f qcow2 "$image" && run "$1" compare -f raw -F qcow2 "$source" "$image"
}

# With data_file_raw=on the data file must equal the source.
data_file_is_raw() {
    [[ $1 != data_file_raw ]] || run cmp "$source" "$work/data.raw"
}

# attempt WRITER CHECKER NAME COMPRESS OPTIONS
attempt() {
    write "$1" "$3" "$4" "$5" && agree "$2" && data_file_is_raw "$3" && read_back
}

# one_form LABEL WRITER CHECKER NAME COMPRESS OPTIONS: prints the line and counts.
one_form() {
    local label=$1 name=$4 start=$SECONDS verdict=ok
    shift
    forms=$((forms + 1))
    if attempt "$@"; then
        passed=$((passed + 1))
    else
        verdict=FAILED
    fi
    printf '%-18s %-16s %s (%d s)\n' "$name" "$label" "$verdict" $((SECONDS - start))
    rm -f "$image" "$work/data.raw" "$work/back.raw"
}

size=1G
parent=${TMPDIR:-/tmp}
while [[ ${1:-} == --* ]]; do
    case $1 in
        --size) size=${2:?--size requires an argument} && shift 2 ;;
        --work) parent=${2:?--work requires an argument} && shift 2 ;;
        --help) usage && exit 0 ;;
        *) die "unknown option '$1'" ;;
    esac
done
[[ $# -eq 2 ]] || { usage >&2; exit 2; }

programs "$1" "$2"
bytes=$(bytes_of "$size")
work_below "$parent"
source=$work/source.raw
image=$work/image.qcow2
forms=0
passed=0

make_file_system "$source" "$bytes"
make_backing "$source" "$bytes"
printf 'image of %s, %s of it data\n' "$size" "$(du -h "$source" | cut -f 1)"

while IFS='|' read -r name compress options; do
    read -r name <<<"$name"
    read -r compress <<<"$compress"
    read -r options <<<"$options"
    [[ -n $name ]] || continue
    one_form 'ours to stock' "$ours" "$stock" "$name" "$compress" "$options"
    one_form 'stock to ours' "$stock" "$ours" "$name" "$compress" "$options"
done <<<"$FORMS"

printf 'roundtrip: %d forms, %d passed, %d failed\n' "$forms" "$passed" $((forms - passed))
((passed == forms))
