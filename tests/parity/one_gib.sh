#!/usr/bin/env bash
# Stands for the release build of `qemu-img` within 1 GiB of address space: QEMU_IMG_UNDER_TEST=$PWD/tests/parity/one_gib.sh.
# The stock program is not limited: it cannot run all cases within so much.
ulimit -v 1048576
exec -a qemu-img "$(dirname "${BASH_SOURCE[0]}")/../../target/release/qemu-img" "$@"
