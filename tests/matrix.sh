#!/usr/bin/env bash
# Converts a real file system image from every format to every other and back, with two programs that must agree.
#
#   tests/matrix.sh [--size 256M] [--work DIR] [--only FORM,...] OURS STOCK
#
# STOCK creates an image of each form. OURS converts it to each form; STOCK compares the result with the file system image and
# runs info and check on it; OURS converts it back to raw, which must equal the file system image byte by byte (cmp).
# Prints a line for each form of the source, and exits with 1 if any conversion failed.
set -euo pipefail

# name | format | creation options | c: the stock program can check the format
readonly FORMS='
raw               | raw       |                                  |
qcow2             | qcow2     |                                  | c
qcow2-zlib        | qcow2     | -c                               | c
qcow              | qcow      |                                  |
qcow-zlib         | qcow      | -c                               |
qed               | qed       |                                  | c
luks              | luks      | -o key-secret=key,iter-time=10   |
vdi               | vdi       |                                  | c
vdi-static        | vdi       | -o static=on                     | c
vpc               | vpc       | -o force_size=on                 |
vpc-fixed         | vpc       | -o subformat=fixed,force_size=on |
vhdx              | vhdx      |                                  | c
vhdx-fixed        | vhdx      | -o subformat=fixed               | c
parallels         | parallels |                                  | c
monolithicSparse  | vmdk      |                                  | c
monolithicFlat    | vmdk      | -o subformat=monolithicFlat      | c
twoGbSparse       | vmdk      | -o subformat=twoGbMaxExtentSparse | c
twoGbFlat         | vmdk      | -o subformat=twoGbMaxExtentFlat  | c
streamOptimized   | vmdk      | -o subformat=streamOptimized     | c
'
# shellcheck source=tests/real_image.sh
source "$(dirname "${BASH_SOURCE[0]}")/real_image.sh"

usage() {
    sed -n 's/^# \{0,1\}//; 2,8p' "$0"
}

# The specification of the image of a format in a file.
image() {
    printf 'driver=%s,file.filename=%s' "$1" "$2"
    [[ $1 != luks ]] || printf ',key-secret=key'
}

# convert PROGRAM FORMAT FILE FORMAT OPTIONS FILE
convert() {
    local -a options
    read -ra options <<<"$5"
    run "$1" convert "${key[@]}" --image-opts "$(image "$2" "$3")" -O "$4" "${options[@]}" "$6"
}

# attempt SOURCE-FORMAT TARGET-FORMAT OPTIONS CHECKED
attempt() {
    local target=$work/target/image
    convert "$ours" "$1" "$work/$from/image" "$2" "$3" "$target" &&
        run "$stock" compare "${key[@]}" --image-opts "$(image "$2" "$target")" "$(image raw "$source")" &&
        run "$stock" info "${key[@]}" --image-opts "$(image "$2" "$target")" &&
        { [[ -z $4 ]] || run "$stock" check --image-opts "$(image "$2" "$target")"; } &&
        convert "$ours" "$2" "$target" raw '' "$work/target/back" &&
        run cmp "$source" "$work/target/back"
}

# Splits a line into its fields, without blanks around them.
fields() {
    IFS='|' read -r name format options checked <<<"$1"
    read -r name <<<"$name"
    read -r format <<<"$format"
    read -r options <<<"$options"
    read -r checked <<<"$checked"
}

size=256M
parent=${TMPDIR:-/tmp}
only=
while [[ ${1:-} == --* ]]; do
    case $1 in
        --size) size=${2:?--size requires an argument} && shift 2 ;;
        --work) parent=${2:?--work requires an argument} && shift 2 ;;
        --only) only=${2:?--only requires an argument} && shift 2 ;;
        --help) usage && exit 0 ;;
        *) die "unknown option '$1'" ;;
    esac
done
[[ $# -eq 2 ]] || { usage >&2; exit 2; }

programs "$1" "$2"
bytes=$(bytes_of "$size")
work_below "$parent"
source=$work/source.raw
printf secret >"$work/key"
key=(--object "secret,id=key,file=$work/key")
make_file_system "$source" "$bytes"
printf 'image of %s, %s of it data\n' "$size" "$(du -h "$source" | cut -f 1)"

lines=()
while read -r line; do
    fields "$line"
    [[ -n $name && (-z $only || ,$only, == *,$name,*) ]] || continue
    lines+=("$line")
done <<<"$FORMS"

conversions=0
failed=0
for line in "${lines[@]}"; do
    fields "$line"
    from=$name from_format=$format
    start=$SECONDS
    mkdir "$work/$from"
    # The stock `convert -c` to qcow exits with 1 without a message; whether the image is complete is checked below.
    convert "$stock" raw "$source" "$format" "$options" "$work/$from/image" >"$work/said" ||
        [[ $name == qcow-zlib ]] || die "no image of the form $from: $(<"$work/said")"
    verdicts=()
    for target in "${lines[@]}"; do
        fields "$target"
        mkdir "$work/target"
        conversions=$((conversions + 1))
        if ! attempt "$from_format" "$format" "$options" "$checked"; then
            failed=$((failed + 1))
            verdicts+=("$name")
        fi
        rm -rf "$work/target"
    done
    rm -rf "${work:?}/$from"
    printf '%-18s to %d forms: %s (%d s)\n' "$from" "${#lines[@]}" "${verdicts[*]:-ok}" $((SECONDS - start))
done

printf 'matrix: %d conversions, %d passed, %d failed\n' "$conversions" $((conversions - failed)) "$failed"
((failed == 0))
