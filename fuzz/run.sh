#!/usr/bin/env bash
# Builds the fuzz targets and runs each for some time, two at once: `fuzz/run.sh [--seconds N] [--tool QEMU_IMG] [TARGET...]`.
# What is found stays in fuzz/corpus, what crashes a target in fuzz/artifacts. With `--tool` they begin with small images.
# Needs no other compiler than the rest: the code is safe, so that no sanitizer has to watch memory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

seconds=20
tool=
while [[ ${1-} == --* ]]; do
    case $1 in
    --seconds) seconds=$2 ;;
    --tool) tool=$2 ;;
    *)
        printf 'usage: %s [--seconds N] [--tool QEMU_IMG] [TARGET...]\n' "$0" >&2
        exit 2
        ;;
    esac
    shift 2
done
mapfile -t all < <(sed -n 's/^name = "\([a-z0-9_]*\)"$/\1/p' Cargo.toml)
[[ $# -gt 0 ]] || set -- "${all[@]}"
HOST=$(rustc -vV | sed -n 's/^host: //p')
readonly BUILD=$PWD/target HOST

build() {
    local -a bins=()
    local name
    for name; do bins+=(--bin "$name"); done
    # What cargo-fuzz passes, without the sanitizer.
    RUSTFLAGS='-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
        -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Cdebug-assertions -Coverflow-checks' \
        CARGO_TARGET_DIR=$BUILD cargo build --quiet --locked --release --target "$HOST" "${bins[@]}"
}

# Runs one target and prints a line: its name, the executions, the inputs that reach something new, and the outcome.
run() {
    local name=$1 log=$BUILD/$1.log outcome=ok
    mkdir -p "corpus/$name" "artifacts/$name"
    "$BUILD/$HOST/release/$name" -max_total_time="$seconds" -timeout=25 -rss_limit_mb=1536 -print_final_stats=1 \
        -artifact_prefix="artifacts/$name/" "corpus/$name" >"$log" 2>&1 || outcome="FAILED, see $log"
    printf '%-24s %12s executions %6s inputs  %s\n' "$name" \
        "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" "$(find "corpus/$name" -type f | wc -l)" "$outcome"
    [[ $outcome == ok ]]
}

build "$@"
[[ -z $tool ]] || ./seeds.sh "$tool" corpus
failed=0
running=0
for name; do
    if ((running == 2)); then
        wait -n || failed=1
        running=1
    fi
    run "$name" &
    running=$((running + 1))
done
while ((running > 0)); do
    wait -n || failed=1
    running=$((running - 1))
done
exit "$failed"
