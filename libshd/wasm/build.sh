#!/bin/sh
# Builds shd.wasm with clang and wasm-ld alone: wasm/build.sh [OUTPUT].  Needs no emscripten and no libc.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
# Shadowed by the system's headers is only string.h.  The stack lies first, so that an overflow traps.
exec "${CLANG:-clang}" --target=wasm32 -std=c11 -O3 -mbulk-memory -nostdlib -ffp-contract=off \
    -Wall -Wextra -Wpedantic -Wconversion -Werror -Wno-missing-prototypes \
    -DSHD_STATIC -I"$here/libc" -I"$here/../include" "$here"/../src/*.c "$here/libc.c" "$here/exports.c" \
    -Wl,--no-entry -Wl,--stack-first -Wl,-z,stack-size=131072 -Wl,--export=__heap_base -Wl,--strip-all \
    -o "${1:-$here/shd.wasm}"
