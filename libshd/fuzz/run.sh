#!/bin/sh
# Builds the fuzz targets with clang, under the address and undefined behaviour sanitizers (and, for the seeds alone, the
# memory sanitizer), and runs each for so many
# seconds, all at a time: fuzz/run.sh [SECONDS] [FOLDER].  The folder keeps what is found, and the corpus for the next
# run.  The seeds are the vectors of the format.  Exit code 1 if anything was found.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
seconds=${1:-60}
work=${2:-$here/build/fuzz}
clang=${CLANG:-clang}

if ! echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' |
    "$clang" -x c - -fsanitize=fuzzer,address -o /dev/null 2>/dev/null; then
    echo "skipped: libFuzzer needs clang with its runtime libraries, which is not installed"
    exit 0
fi

# Only the library guides the fuzzer, and not by its comparisons: checksums are made right anyway, and it is twice as
# fast without.
flags="-std=c11 -O2 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all"
flags="$flags -DSHD_STATIC -I$here/include"
mkdir -p "$work/objects"
for source in "$here"/src/*.c; do
    # shellcheck disable=SC2086  # flags are words
    "$clang" $flags -fsanitize=fuzzer-no-link -fno-sanitize-coverage=trace-cmp -c "$source" \
        -o "$work/objects/$(basename "$source").o"
done
for target in open decode apply base; do
    # shellcheck disable=SC2086
    "$clang" $flags "$here/fuzz/$target.c" "$here/fuzz/common.c" "$here/tests/support.c" "$work"/objects/*.o \
        -fsanitize=fuzzer -fno-sanitize-coverage=inline-8bit-counters,pc-table,trace-cmp -lm -o "$work/$target"
done

# The library's own tests, and the targets on all seeds, under the memory sanitizer: nothing uninitialised is used.
memory="-std=c11 -O1 -g -ffp-contract=off -fsanitize=memory -fsanitize-memory-track-origins -DSHD_STATIC -I$here/include"
tests=$(find "$here/tests" -name '*.c' ! -name dump.c)
# shellcheck disable=SC2086
"$clang" $memory "$here"/src/*.c $tests -lm -o "$work/memory-tests"
"$work/memory-tests"
for target in open decode apply base; do
    # shellcheck disable=SC2086
    "$clang" $memory "$here/fuzz/$target.c" "$here/fuzz/common.c" "$here/tests/support.c" "$here"/src/*.c \
        -fsanitize=fuzzer -lm -o "$work/memory-$target"
    "$work/memory-$target" -runs=0 -max_len=9216 "$here/../spec/vectors/valid" "$here/../spec/vectors/invalid" \
        >"$work/memory-$target.log" 2>&1 || { cat "$work/memory-$target.log"; exit 1; }
done

cd "$work"
for target in open decode apply base; do
    mkdir -p "corpus-$target"
    "./$target" -max_total_time="$seconds" -max_len=9216 -timeout=10 -print_final_stats=1 -artifact_prefix="$target-" \
        "corpus-$target" "$here/../spec/vectors/valid" "$here/../spec/vectors/invalid" >"$target.log" 2>&1 &
    eval "$target=$!"
done
found=0
for target in open decode apply base; do
    eval "process=\$$target"
    if wait "$process"; then
        sed -n "s/^Done \([0-9]*\) runs in \([0-9]*\) .*/$target: \1 executions in \2 s, nothing found/p" "$target.log"
    else
        found=1
        grep -E 'not so:|ERROR: |runtime error|SUMMARY|Test unit written' "$target.log" || tail -n 20 "$target.log"
    fi
done
exit $found
