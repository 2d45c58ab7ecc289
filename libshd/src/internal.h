/* What every source file needs: the public header, what the compiler can do, the limits of the format, and a little
 * arithmetic. Nothing of it is visible outside of the library. */
#ifndef SHD_INTERNAL_H
#define SHD_INTERNAL_H

#define SHD_BUILDING
#include "../include/shd.h" /* by its place, so that no compiler option is needed */

#include <string.h>

/* The headers put their declarations between these two, so that no other library sees the names. */
#if defined(__GNUC__)
#define SHDI_BEGIN _Pragma("GCC visibility push(hidden)")
#define SHDI_END _Pragma("GCC visibility pop")
#else
#define SHDI_BEGIN
#define SHDI_END
#endif

#if defined(__GNUC__)
#define SHDI_PREFETCH(address) __builtin_prefetch((address), 1, 2)
#else
#define SHDI_PREFETCH(address) ((void)(address))
#endif

/* A function that is called once for a file, a tensor or a call: it is made small, not fast. */
#if defined(__GNUC__)
#define SHDI_ONCE __attribute__((cold))
#else
#define SHDI_ONCE
#endif

/* A function that is called often. gcc takes what follows a call of an SHDI_ONCE function for rare, and with it every
 * function that is called from there alone, and makes them small, too: this one is made fast. */
#if defined(__GNUC__)
#define SHDI_OFTEN __attribute__((hot, noinline))
#else
#define SHDI_OFTEN
#endif

/* The kernels of avx2.c need the function attributes of gcc and clang. On Windows gcc does not align the stack for
 * them (its bug 54412). */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(SHD_NO_SIMD) && (!defined(_WIN32) || defined(__clang__))
#define SHDI_AVX2 1
#else
#define SHDI_AVX2 0
#endif

#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(SHD_NO_SIMD)
#define SHDI_NEON 1
#else
#define SHDI_NEON 0
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "libshd supports little-endian machines only"
#endif

/* ---- Limits of REGISTRY.md and constants of FORMAT.md ---- */

#define SHDI_MAX_TENSORS 1048576u
#define SHDI_MAX_NAMES_SIZE 67108864u
#define SHDI_MAX_METADATA_SIZE 16777216u
#define SHDI_MAX_EXTENSION_SIZE 67108864u
#define SHDI_MAX_NAME_SIZE 1024u
#define SHDI_MAX_RANK 8u
#define SHDI_MAX_NUMEL (UINT64_C(1) << 56)
#define SHDI_MAX_RICE_K 31u
#define SHDI_MAX_LINES 256u
#define SHDI_MAX_ZSTD_RATIO 64u

#define SHDI_FEATURE_ZSTD 1u
#define SHDI_FEATURE_PACKED 4u
#define SHDI_HEADER_SIZE 128u
#define SHDI_RECORD_SIZE 160u
#define SHDI_SLACK 8u
#define SHDI_BLOCK 2048u
#define SHDI_GROUP 128u

/* The size of a directory word and of a RAW position. */
static inline uint32_t shdi_word(uint64_t numel) { return numel <= UINT32_MAX ? 4 : 8; }

/* ---- Arithmetic ---- */

static inline uint64_t shdi_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t shdi_ceil_div(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }
static inline uint64_t shdi_align4(uint64_t n) { return (n + 3) & ~UINT64_C(3); }
static inline uint64_t shdi_align64(uint64_t n) { return (n + 63) & ~UINT64_C(63); }

#endif
