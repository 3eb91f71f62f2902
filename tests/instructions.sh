#!/usr/bin/env bash
# Counts the instructions of the hot paths of a release build and compares them with the baseline in the tree:
#
#   tests/instructions.sh QEMU-IMG            fails if a path takes a tenth more than the baseline
#   tests/instructions.sh --update QEMU-IMG   writes the baseline anew
#
# Time on a shared machine differs by tens of percent from run to run, the number of instructions by less than a
# thousandth: valgrind counts them, on a processor of its own, with the threads of the program one at a time. What
# changes the number without a change of the program is named in the first line of the baseline: compiler, C library,
# valgrind, and the instruction sets of this machine among which the program and the C library choose. The counts are
# compared only where that line is the same; elsewhere the comparison is skipped, and says so.
set -euo pipefail

readonly BASELINE=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/instructions.txt
# In percent of the baseline.
readonly LIMIT=110

die() {
    printf 'instructions: %s\n' "$*" >&2
    exit 1
}

update=
if [[ ${1-} == --update ]]; then
    update=1
    shift
fi
[[ $# -eq 1 && -x $1 ]] || die "usage: tests/instructions.sh [--update] QEMU-IMG"
command -v valgrind >/dev/null || die "there is no valgrind (package valgrind)"
QEMU_IMG=$(realpath "$1")
WORK=$(mktemp -d)
readonly QEMU_IMG WORK
trap 'rm -rf "$WORK"' EXIT

# What the counts depend on besides the program.
surroundings() {
    local sets
    # valgrind offers these to programs if the machine has them, and nothing newer.
    sets=$(grep -m1 '^flags' /proc/cpuinfo | grep -ow -e avx2 -e bmi2 -e sha_ni | sort -u | paste -sd+ -)
    printf '%s, %s, %s, %s %s\n' "$(rustc --version)" "$(getconf GNU_LIBC_VERSION)" "$(valgrind --version)" \
        "$(uname -m)" "${sets:-plain}"
}

# The number of instructions of one command. An empty environment: the dynamic linker reads it.
count() {
    env -i valgrind --tool=callgrind --callgrind-out-file=/dev/null "$QEMU_IMG" "$@" 2>log >/dev/null ||
        die "failed: qemu-img $*: $(tail -n 3 log)"
    sed -n 's/^==[0-9]*== Collected : \([0-9]*\).*/\1/p' log
}

# Prints the name of a path and its count.
path() {
    local name=$1
    shift
    printf '%-16s %s\n' "$name" "$(count "$@")"
}

# The same input everywhere: 4 MiB of text, holes, and 4 MiB with small holes.
inputs() {
    seq 100000000 100500000 >text
    truncate -s 4M text
    cp text a.raw
    dd if=text of=a.raw bs=1M seek=12 conv=notrunc status=none
    truncate -s 32M a.raw
    local at
    for at in 13 14 15; do dd if=/dev/zero of=a.raw bs=4k seek=$((at * 256 + 8)) count=8 conv=notrunc status=none; done
}

paths() {
    path version --version
    path create-metadata create -q -f qcow2 -o preallocation=metadata large.qcow2 64G
    path check check -q large.qcow2
    path raw-qcow2 convert -m 1 -f raw -O qcow2 a.raw a.qcow2
    path raw-small convert -m 1 -f raw -O qcow2 -o cluster_size=512 a.raw small.qcow2
    path raw-zlib convert -m 1 -f raw -O qcow2 -c a.raw zlib.qcow2
    path zlib-raw convert -m 1 -f qcow2 -O raw zlib.qcow2 b.raw
    path qcow2-raw convert -m 1 -f qcow2 -O raw a.qcow2 b.raw
    path map map -f qcow2 small.qcow2
    path info info a.qcow2
}

# Prints each path with its count and that of the baseline; fails if one is above the limit or missing.
compare() {
    awk -v limit=$LIMIT '
        FNR == 1 && NR == 1 { next }
        NR == FNR { before[$1] = $2; next }
        !($1 in before) { printf "%-16s %12d  not in the baseline\n", $1, $2; bad = 1; next }
        {
            percent = 100 * $2 / before[$1]
            verdict = percent > limit ? "  too many" : ""
            bad = bad || percent > limit
            printf "%-16s %12d of %12d  %6.1f %%%s\n", $1, $2, before[$1], percent, verdict
            delete before[$1]
        }
        END {
            for (name in before) { print name " is in the baseline only"; bad = 1 }
            exit bad
        }' "$BASELINE" counts
}

here=$(surroundings)
if [[ ! $update && $(head -n 1 "$BASELINE") != "$here" ]]; then
    printf 'instructions: SKIPPED, the baseline is of other surroundings\n  baseline: %s\n  here:     %s\n' \
        "$(head -n 1 "$BASELINE")" "$here"
    exit 0
fi
cd "$WORK"
inputs
paths >counts
if [[ $update ]]; then
    { printf '%s\n' "$here"; cat counts; } >"$BASELINE"
    cat "$BASELINE"
    exit 0
fi
compare || die "more than $LIMIT % of the baseline; if that is meant: tests/instructions.sh --update QEMU-IMG"
