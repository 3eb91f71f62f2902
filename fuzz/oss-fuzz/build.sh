#!/bin/bash -eu
# Builds all targets into $OUT, each with its first inputs.
cd "$SRC/qemu-img-rs"
cargo build --release --locked -p qemu-img-rs --target-dir /tmp/tool
fuzz/seeds.sh /tmp/tool/release/qemu-img /tmp/seeds

cd fuzz
cargo fuzz build -O
for binary in target/x86_64-unknown-linux-gnu/release/*; do
    [[ -f $binary && -x $binary ]] || continue
    name=$(basename "$binary")
    cp "$binary" "$OUT/"
    [[ ! -d /tmp/seeds/$name ]] || zip -q -j "$OUT/${name}_seed_corpus.zip" "/tmp/seeds/$name"/*
done
