/* What the source files share. Nothing here is visible outside of the library. */
#ifndef SHD_INTERNAL_H
#define SHD_INTERNAL_H

#define SHD_BUILDING
#include "../include/shd.h" /* by its place, so that no compiler option is needed */

#include <string.h>

#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#define SHDI_PREFETCH(address) __builtin_prefetch((address), 1, 2)
#else
#define SHDI_PREFETCH(address) ((void)(address))
#endif

/* The hand-written kernels of avx2.c need the function attributes of gcc and clang. On Windows gcc does not align the
 * stack for them (its bug 54412). */
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
#define SHDI_HEADER_SIZE 128u
#define SHDI_RECORD_SIZE 160u
#define SHDI_SLACK 8u
#define SHDI_BLOCK 2048u
#define SHDI_GROUP 128u

/* ---- Little-endian loads and stores at any alignment ---- */

static inline uint16_t shdi_load16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t shdi_load32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint64_t shdi_load64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void shdi_store16(uint8_t *p, uint16_t v) { memcpy(p, &v, sizeof v); }
static inline void shdi_store32(uint8_t *p, uint32_t v) { memcpy(p, &v, sizeof v); }
static inline void shdi_store64(uint8_t *p, uint64_t v) { memcpy(p, &v, sizeof v); }

/* Makes the compiler keep a value that was loaded, and checked, instead of loading it again: the file may change. */
#if defined(__GNUC__)
#define SHDI_PIN(value) __asm__ volatile("" : "+r"(value))
#else
#define SHDI_PIN(value) ((void)(value))
#endif

static inline uint64_t shdi_load_word(const uint8_t *p, uint32_t word) {
    uint64_t v = word == 4 ? shdi_load32(p) : shdi_load64(p);
    SHDI_PIN(v);
    return v;
}

static inline void shdi_store_word(uint8_t *p, uint32_t word, uint64_t v) {
    if (word == 4) {
        shdi_store32(p, (uint32_t)v);
    } else {
        shdi_store64(p, v);
    }
}

/* ---- Bits ---- */

#if defined(__GNUC__)
static inline uint32_t shdi_lowest_one(uint64_t v) { return (uint32_t)__builtin_ctzll(v); }
#else
static inline uint32_t shdi_lowest_one(uint64_t v) {
    uint32_t n = 0;
    for (uint32_t half = 32; half != 0; half /= 2) {
        if ((v & ((UINT64_C(1) << half) - 1)) == 0) {
            v >>= half;
            n += half;
        }
    }
    return n;
}
#endif

/* Without the instruction, a builtin would be a call of libgcc. */
static inline uint32_t shdi_ones(uint64_t v) {
    v = v - ((v >> 1) & UINT64_C(0x5555555555555555));
    v = (v & UINT64_C(0x3333333333333333)) + ((v >> 2) & UINT64_C(0x3333333333333333));
    v = (v + (v >> 4)) & UINT64_C(0x0F0F0F0F0F0F0F0F);
    return (uint32_t)((v * UINT64_C(0x0101010101010101)) >> 56);
}

static inline uint64_t shdi_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t shdi_ceil_div(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }
static inline uint64_t shdi_align4(uint64_t n) { return (n + 3) & ~UINT64_C(3); }
static inline uint64_t shdi_align64(uint64_t n) { return (n + 63) & ~UINT64_C(63); }

/* ---- Floats as bits ---- */

static inline float shdi_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t shdi_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline int shdi_is_finite(float f) { return (shdi_bits(f) & 0x7F800000u) != 0x7F800000u; }
static inline int shdi_is_nan(float f) { return (shdi_bits(f) & 0x7FFFFFFFu) > 0x7F800000u; }
static inline float shdi_from_bf16(uint16_t h) { return shdi_float((uint32_t)h << 16); }

/* To nearest, ties to even. Not for NaN. */
static inline uint16_t shdi_to_bf16(float f) {
    uint32_t u = shdi_bits(f);
    return (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

float shdi_from_f16(uint16_t h);
uint16_t shdi_to_f16(float f); /* to nearest, ties to even; not for NaN */

/* The floating point environment that the format's arithmetic is defined in, while a call computes. */
typedef struct shdi_float_environment {
    uint32_t saved;
} shdi_float_environment;

shdi_float_environment shdi_float_enter(void);
void shdi_float_leave(shdi_float_environment environment);

/* ---- Errors ---- */

int shdi_fail(shd_status *status, int code, uint32_t tensor, uint64_t offset);

/* What a section's decoder refuses: the code, and where in the decoded section. */
typedef struct shdi_fault {
    int code;
    uint64_t offset;
} shdi_fault;

static inline shdi_fault shdi_fault_at(int code, uint64_t offset) {
    shdi_fault fault = {code, offset};
    return fault;
}

static inline shdi_fault shdi_ok(void) { return shdi_fault_at(SHD_OK, 0); }

/* A fault of a tensor's section as the error of a call. */
int shdi_fail_in(shd_status *status, shdi_fault fault, const shd_tensor *tensor, const shd_section *section);

/* ---- Container (container.c, table.c, utf8.c) ---- */

int shdi_valid_utf8(const uint8_t *text, uint64_t size);

/* The bytes [offset, offset + size) of the file: where they lie, or read into `buffer`. NULL if reading failed. */
const uint8_t *shdi_view(const shd_file *file, uint64_t offset, uint64_t size, void *buffer);

/* Checks that the bytes between the end of a section and the aligned end are zero. */
int shdi_check_padding(const shd_file *file, uint64_t end, uint32_t tensor, shd_status *status);

int shdi_check_table(const shd_file *file, uint64_t sections_offset, shd_status *status);

/* The decoded size that a codec has, or that a section of `decoded` bytes is one of the sizes it may have. */
uint64_t shdi_values_size(uint32_t value_codec, uint32_t dtype, uint64_t count);
int shdi_index_size_is_possible(const shd_tensor *tensor, uint64_t decoded);

static inline uint32_t shdi_word(uint64_t numel) { return numel <= UINT32_MAX ? 4 : 8; }

/* ---- Positions (cursor.c, rice.c, lines.c) ---- */

/* A run of up to SHDI_BLOCK positions, in increasing order: base + offset[i] has rank rank + i. */
typedef struct shdi_piece {
    uint64_t base;
    uint64_t rank;
    uint32_t count;
    uint32_t offset[SHDI_BLOCK + 16]; /* kernels may write a few entries too many */
} shdi_piece;

/* A progression of rows, columns or diagonals: an entry of a STRUCT. */
typedef struct shdi_progression {
    uint64_t kind;
    int64_t start;
    uint64_t step;
    uint64_t count;
} shdi_progression;

/* Where a walk over the progressions of one kind is: line `line` of entry `entry`. */
typedef struct shdi_line_cursor {
    uint32_t first_entry;
    uint32_t end_entry;
    uint32_t entry;
    uint64_t line;
} shdi_line_cursor;

/* A walk over the positions of a STRUCT. Works on a copy of the entries, so that they stay as they were checked. */
typedef struct shdi_lines {
    shdi_progression entries[SHDI_MAX_LINES];
    uint64_t rows;
    uint64_t columns;
    uint64_t position; /* the next position, or UINT64_MAX at the end */
    uint64_t row;      /* the row that is being listed */
    uint64_t next;     /* the next column to be listed, if the whole row is */
    uint32_t row_kind; /* 0: a new row has to be found, 1: the whole row is listed, 2: its columns and diagonals are */
    shdi_line_cursor whole;    /* the first whole row at or after `row` */
    shdi_line_cursor column;   /* the next column in this row */
    shdi_line_cursor diagonal; /* the next diagonal in this row */
    shdi_line_cursor lowest;   /* the lowest diagonal that meets this row or an earlier one */
} shdi_lines;

/* Where a walk within a RICE block whose k is too large for 32-bit offsets is. */
typedef struct shdi_wide {
    uint32_t bit;
    uint32_t ones;
    uint64_t low_sum;
} shdi_wide;

/* A walk over the positions of blocks [block, last). */
typedef struct shdi_cursor {
    const shd_delta *delta;
    uint64_t block;
    uint64_t last;
    uint64_t rank; /* of the next position; used where the codec's blocks do not say it */
    uint64_t base; /* of the RICE block in work */
    shdi_wide wide;
    shdi_lines lines;
} shdi_cursor;

shdi_fault shdi_cursor_open(shdi_cursor *cursor, const shd_delta *delta, uint64_t first_block, uint64_t last_block);

/* The next piece; its count is 0 at the end and only there. All positions are below numel, all ranks below nnz. */
shdi_fault shdi_cursor_next(shdi_cursor *cursor, shdi_piece *piece);

/* Fills in what the section's own header says, checking it. */
shdi_fault shdi_index_open(shd_delta *delta);

/* Every check of section 4 after zstd. */
shdi_fault shdi_index_check(const shd_delta *delta);

shdi_fault shdi_rice_open(shd_delta *delta);
shdi_fault shdi_rice_check(const shd_delta *delta);
shdi_fault shdi_rice_next(shdi_cursor *cursor, shdi_piece *piece);

shdi_fault shdi_lines_open(shdi_lines *lines, const shd_delta *delta);
shdi_fault shdi_lines_check(const shd_delta *delta);
void shdi_lines_next(shdi_lines *lines, uint64_t limit, shdi_piece *piece);

shdi_fault shdi_check_zeros(const uint8_t *section, uint64_t first, uint64_t end);

/* ---- Values (values.c) ---- */

/* Values of ranks [rank, rank + count), which exist, as binary32; refuses those that section 5 does. */
shdi_fault shdi_values_decode(const shd_delta *delta, uint64_t rank, uint64_t count, float *values);
shdi_fault shdi_values_check(const shd_delta *delta);

/* ---- Weights (apply.c, sum.c) ---- */

/* Elements with indices shift + offset[i] in the weight buffer, all of them inside; ranks rank + i. */
typedef struct shdi_run {
    uint64_t shift;
    uint64_t rank;
    const uint32_t *offset;
    uint32_t count;
} shdi_run;

/* Reads elements of `size` bytes, and sends for those of `ahead`, which has as many, with each. */
void shdi_gather(const uint8_t *weights, uint32_t size, const shdi_run *r, const shdi_run *ahead, uint8_t *to);
void shdi_scatter(uint8_t *weights, uint32_t size, const shdi_run *r, const uint8_t *from);
void shdi_send_for(const uint8_t *weights, uint32_t size, const shdi_run *r);

/* What is wrong with a call that patches `weights`; `saved` may be NULL. */
int shdi_check_weights(const shd_delta *delta, const shd_weights *weights, const void *saved);
int shdi_check_strength(const shd_tensor *tensor, double strength);

/* ---- Content digest (sha256.c, digest.c) ---- */

typedef struct shdi_sha256 {
    uint32_t state[8];
    uint64_t size;
    uint8_t block[64];
} shdi_sha256;

void shdi_sha256_start(shdi_sha256 *hash);
void shdi_sha256_add(shdi_sha256 *hash, const void *data, size_t size);
void shdi_sha256_end(shdi_sha256 *hash, uint8_t digest[32]);

/* ---- Kernels: what is worth SIMD. The scalar ones define the results. ---- */

typedef struct shdi_kernels {
    const char *name;

    /* Writes the indices of the ones among bits [0, bits) of a bitmap, bits <= SHDI_BLOCK; returns their number. Reads
     * whole 64-bit words of the bitmap. May write up to 8 entries too many. */
    uint32_t (*ones)(const uint8_t *bitmap, uint32_t bits, uint32_t *index);

    /* Turns indices t of unary ones into offsets ((t - i) << k) + (r[0] + ... + r[i]) + i, in place, where r[i] is
     * the k bits from bit `low_bit` + i * k of `low` on; returns the sum of all r. k <= SHDI_NARROW_K. `low_size`
     * bytes may be read, at least 8 more than r needs. */
    uint64_t (*rice_offsets)(uint32_t *t, uint32_t count, uint32_t k, const uint8_t *low, uint64_t low_size,
                             uint64_t low_bit);

    void (*widen)(const uint32_t *offset, uint32_t count, uint64_t base, int64_t *positions);

    /* values[i] = fl32(scale * q[i]) */
    void (*scale_i8)(const uint8_t *q, uint32_t count, float scale, float *values);

    /* values[i] = magnitude[nibble & 7], negative where bit 3 is set; nibbles from number `first` on */
    void (*look_up_i4)(const uint8_t *nibbles, uint64_t first, uint32_t count, const float magnitude[8], float *values);

    /* result = weight + alpha * value by section 6.1, elementwise; result may be the same as weight */
    void (*add_f32)(uint32_t *result, const uint32_t *weight, const float *value, float alpha, uint32_t count);
    void (*add_f16)(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count);
    void (*add_bf16)(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count);

    /* Indices i < count of |x[i]| >= threshold; count <= SHDI_BLOCK. May write up to 8 entries too many. */
    uint32_t (*at_least)(const float *x, uint32_t count, float threshold, uint32_t *index);

    /* The sum over i of (gap[i] >> k) */
    uint64_t (*sum_shifted)(const uint64_t *gap, uint32_t count, uint32_t k);
} shdi_kernels;

/* A block's offsets fit 32 bits up to here: 4,096 * 2^19 + 2,048 < 2^32. */
#define SHDI_NARROW_K 19u

extern const shdi_kernels shdi_kernels_scalar;
#if SHDI_AVX2
extern const shdi_kernels shdi_kernels_avx2;

/* Continues a CRC-32, inverted before and after, over `size` bytes: a multiple of 16, at least 64. */
uint32_t shdi_crc32_fold(uint32_t crc, const uint8_t *data, size_t size);
#endif

#if SHDI_NEON
uint32_t shdi_neon_ones(const uint8_t *bitmap, uint32_t bits, uint32_t *index);
uint64_t shdi_neon_rice_offsets(uint32_t *t, uint32_t count, uint32_t k, const uint8_t *low, uint64_t low_size,
                                uint64_t low_bit);
#endif
const shdi_kernels *shdi_kernels_best(void);

static inline const shdi_kernels *shdi_kernels_of(const shd_delta *delta) {
    return delta->scalar ? &shdi_kernels_scalar : shdi_kernels_best();
}

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
