/* libshd: reads .shd files (sparse weight deltas, spec/FORMAT.md) and patches weights with them.
 *
 * In one breath: shd_open() validates a file, shd_load() makes one of its tensors ready, shd_apply() patches
 * a weight buffer with it and keeps what it overwrote, shd_revert() puts that back, bit for bit.
 *
 * Memory    The library allocates nothing and has no state of its own. Every struct and every buffer is the
 *           caller's. A call needs up to 64 KiB of stack.
 * Errors    Every function that can fail returns an int: SHD_OK (0) or one of `enum shd_error`. Where there is a
 *           `status` parameter, it may be NULL; otherwise it is filled in, on success too.
 * Structs   A `shd_file` or `shd_delta` may be copied and forgotten at will. One whose making failed is empty: it has
 *           no tensors, or no blocks.
 * Threads   Nothing is shared, so calls on different structs never disturb each other. A `shd_file` and a
 *           `shd_delta` are only read after shd_open() and shd_load(): several threads may use one at a time.
 *           shd_apply(), shd_revert() and shd_fingerprint() may run at a time on one weight buffer and one
 *           `saved` buffer for block ranges that do not overlap.
 * Hostility Files are untrusted. A file that changes while it is used (a mapping that somebody writes to) can give
 *           wrong values, but never a write outside the caller's buffers: each position is checked against the
 *           buffer on the way to the write.
 * Sizes     Byte counts unless said otherwise. Positions, counts and ranks count elements. Ranges are half open.
 * Floats    The caller's floating point environment is round-to-nearest; on x86 the library sets that itself, and
 *           keeps denormals, for the time of a call.
 */
#ifndef SHD_H
#define SHD_H

#include <stddef.h>
#include <stdint.h>

#if defined(SHD_STATIC)
#define SHD_API
#elif defined(_WIN32)
#if defined(SHD_BUILDING)
#define SHD_API __declspec(dllexport)
#else
#define SHD_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define SHD_API __attribute__((visibility("default")))
#else
#define SHD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Version ---------------------------------------------------------------------------------------------- */

#define SHD_VERSION "1.0.0"
#define SHD_ABI 1 /* changes with every change of a struct, of a number or of a signature */

SHD_API const char *shd_version(void); /* the SHD_VERSION that the library was built with */
SHD_API int shd_abi(void);             /* the SHD_ABI that the library was built with */

/* ---- Errors ----------------------------------------------------------------------------------------------- */

/* Up to SHD_WRONG_BASE these are the reason codes of spec/REGISTRY.md: why the file is refused. From
 * SHD_INVALID_ARGUMENT on it is the call that is wrong. Numbers do not change within an SHD_ABI. */
enum shd_error {
    SHD_OK = 0,
    SHD_BAD_MAGIC,
    SHD_TRUNCATED,
    SHD_UNSUPPORTED_VERSION,
    SHD_HEADER_CHECKSUM,
    SHD_UNKNOWN_FEATURE,
    SHD_RESERVED_NOT_ZERO,
    SHD_TRAILING_DATA,
    SHD_LIMIT_EXCEEDED,
    SHD_SECTION_LAYOUT,
    SHD_SECTION_CHECKSUM,
    SHD_PADDING_NOT_ZERO,
    SHD_BAD_METADATA,
    SHD_NAME_LAYOUT,
    SHD_BAD_NAME,
    SHD_DUPLICATE_NAME,
    SHD_NAME_ORDER,
    SHD_UNKNOWN_DTYPE,
    SHD_UNKNOWN_OP,
    SHD_UNKNOWN_INDEX_CODEC,
    SHD_UNKNOWN_VALUE_CODEC,
    SHD_BAD_SHAPE,
    SHD_BAD_COUNT,
    SHD_BAD_COMBINATION,
    SHD_ZSTD_RATIO,
    SHD_BAD_SIZE,
    SHD_ZSTD_UNAVAILABLE,
    SHD_BAD_ZSTD,
    SHD_BAD_INDEX,
    SHD_POSITION_ORDER,
    SHD_POSITION_RANGE,
    SHD_BAD_DIRECTORY,
    SHD_BAD_VALUE,
    SHD_DIGEST_MISMATCH,
    SHD_BASE_NEEDED,
    SHD_WRONG_BASE,

    SHD_INVALID_ARGUMENT = 64, /* a null pointer, or a range that does not exist */
    SHD_BUFFER_TOO_SMALL,      /* a buffer of the caller is too small for the result */
    SHD_MISALIGNED,            /* a buffer is not aligned to its elements */
    SHD_WRONG_DTYPE,           /* the tensor does not apply to weights of this dtype */
    SHD_WRONG_SHAPE,           /* the weight buffer does not have the tensor's number of elements */
    SHD_WRONG_OPERATION,       /* the tensor's op or codec has no such result (DROP has nothing to apply) */
    SHD_BAD_STRENGTH,          /* not finite, or not 1 where only 1 is allowed */
    SHD_READ_FAILED,           /* the read callback reported an error */
    SHD_NOT_FOUND,             /* no tensor or key of this name */
    SHD_VALUES_DO_NOT_FIT,     /* encoding: values that the codec cannot hold (FORMAT.md, section 8) */
    SHD_OUT_OF_RANGE           /* ULP: a weight would leave the range of its dtype; the base is another one */
};

#define SHD_NO_TENSOR UINT32_MAX

typedef struct shd_status {
    int32_t code;    /* enum shd_error */
    uint32_t tensor; /* the tensor's number in the table, or SHD_NO_TENSOR */
    uint64_t offset; /* in the file: of the field, byte or section that was refused; 0 for errors of the call */
} shd_status;

/* The reason code in lower case ("bad_magic"), "ok", or "unknown_error". Never NULL, never freed. */
SHD_API const char *shd_error_name(int code);

/* ---- Ids, as in spec/REGISTRY.md --------------------------------------------------------------------------- */

enum shd_dtype {
    SHD_UNSPECIFIED = 0,
    SHD_F32 = 1,
    SHD_F16 = 2,
    SHD_BF16 = 3,
    SHD_F64 = 4,
    SHD_F8_E4M3 = 5,
    SHD_F8_E5M2 = 6,
    SHD_F8_E8M0 = 7,
    SHD_BOOL = 8,
    SHD_U8 = 9,
    SHD_I8 = 10,
    SHD_U16 = 11,
    SHD_I16 = 12,
    SHD_U32 = 13,
    SHD_I32 = 14,
    SHD_U64 = 15,
    SHD_I64 = 16,
    SHD_F8_E4M3FNUZ = 17,
    SHD_F8_E5M2FNUZ = 18,
    SHD_C64 = 19
};

enum shd_op {
    SHD_OP_ADD = 0,
    SHD_OP_SET = 1,
    SHD_OP_ULP = 2,
    SHD_OP_NEW = 3,
    SHD_OP_DROP = 4,
    SHD_OP_REPLACE = 6
};

enum shd_index_codec {
    SHD_INDEX_NONE = 0,
    SHD_INDEX_RICE = 1,
    SHD_INDEX_RAW = 2,
    SHD_INDEX_BITMAP = 3,
    SHD_INDEX_STRUCT = 4,
    SHD_INDEX_ALL = 5,
    SHD_INDEX_TILED = 7,
    SHD_INDEX_SEEDED = 10,
    SHD_INDEX_FROM_BASE = 11
};

enum shd_value_codec {
    SHD_VALUES_NONE = 0,
    SHD_VALUES_F32 = 1,
    SHD_VALUES_F16 = 2,
    SHD_VALUES_BF16 = 3,
    SHD_VALUES_I8 = 4,
    SHD_VALUES_I4 = 5,
    SHD_VALUES_SIGN = 6,
    SHD_VALUES_BITS = 7,
    SHD_VALUES_ULP = 8,
    SHD_VALUES_ULP_FROM_BASE = 10
};

enum shd_flags {
    SHD_HAS_BASE_FINGERPRINT = 1,
    SHD_HAS_RESULT_FINGERPRINT = 2,
    SHD_INDEX_ZSTD = 4,
    SHD_VALUES_ZSTD = 8
};

/* Bytes of one element: 1, 2, 4 or 8; 0 for SHD_UNSPECIFIED and for an unknown id. */
SHD_API uint32_t shd_dtype_size(int dtype);

/* ---- Files ------------------------------------------------------------------------------------------------- */

/* Reads exactly `size` bytes at `offset` of the file. Returns 0, or anything else for failure. If several threads
 * load tensors of one file, it is called from all of them. */
typedef int (*shd_read_fn)(void *context, uint64_t offset, void *buffer, size_t size);

/* Decompresses `source`, which has to be exactly one zstd frame without a dictionary whose header states a content
 * size of exactly `size` bytes (ZSTD_getFrameContentSize, ZSTD_findFrameCompressedSize), into `result`. Returns 0, or
 * anything else if it is not. */
typedef int (*shd_zstd_fn)(void *context, const void *source, size_t source_size, void *result, size_t size);

/* An open file. To be read, not written: `tensor_count`, `minor`, `digest` and `front_size` are of use. */
typedef struct shd_file {
    const uint8_t *data; /* the whole file, or its front (what lies before EXTENSION) */
    uint64_t size;
    uint64_t front_size;
    shd_read_fn read; /* NULL for a file in memory */
    void *read_context;
    shd_zstd_fn zstd;
    void *zstd_context;
    uint64_t incompatible;
    uint64_t compatible;
    uint64_t names_offset;
    uint64_t names_size;
    uint64_t metadata_offset;
    uint64_t metadata_size;
    uint32_t tensor_count;
    uint16_t minor;
    uint16_t reserved;
    uint8_t digest[32]; /* of the contents (FORMAT.md, section 7): the delta's identity */
} shd_file;

/* Opens a file that lies in memory at `data` (any alignment) and makes every check of sections 2 and 3 of FORMAT.md.
 * What INDEX and VALUES hold is checked by shd_load(). `data` must stay where it is while `file` is used. */
SHD_API int shd_open(shd_file *file, const void *data, uint64_t size, shd_status *status);

/* The same through a callback. `front` receives the header, the table, the names and the metadata, and must stay
 * where it is. If `front_size` is too small the result is SHD_BUFFER_TOO_SMALL and file->front_size says how
 * much is needed; 128 bytes are enough to ask. */
SHD_API int shd_open_callback(shd_file *file, shd_read_fn read, void *context, uint64_t size, void *front,
                              uint64_t front_size, shd_status *status);

/* Without this a zstd section is refused: SHD_ZSTD_UNAVAILABLE. */
SHD_API void shd_set_zstd(shd_file *file, shd_zstd_fn zstd, void *context);

/* A packed file (FORMAT.md, section 2.3) is one on its way, and stands for another. shd_open() refuses it:
 * SHD_UNKNOWN_FEATURE; the other one can be opened. */

/* The bytes of the buffer that shd_unpack() needs, at most 195 times the file's; 0 for a file that is not packed. */
SHD_API uint64_t shd_unpack_size(const void *data, uint64_t size);

/* Writes the file that a packed one stands for to `result`, and its size; on an error, anything. `capacity` is at least
 * shd_unpack_size(). */
SHD_API int shd_unpack(const void *data, uint64_t size, shd_zstd_fn zstd, void *context, void *result, uint64_t capacity,
                       uint64_t *unpacked, shd_status *status);

/* Walks the metadata: start with *cursor = 0; SHD_NOT_FOUND is the end. Strings are UTF-8, without a zero at the end,
 * and may hold any character. */
SHD_API int shd_metadata_next(const shd_file *file, uint64_t *cursor, const char **key, uint32_t *key_size,
                              const char **value, uint32_t *value_size);

/* ---- Tensors ----------------------------------------------------------------------------------------------- */

typedef struct shd_section {
    uint64_t offset;  /* in the file */
    uint64_t stored;  /* bytes in the file */
    uint64_t decoded; /* bytes after zstd */
    uint32_t crc;
    uint32_t zstd; /* 0 or 1 */
} shd_section;

typedef struct shd_tensor {
    const char *name; /* UTF-8, without a zero at the end; no control characters */
    uint32_t name_size;
    uint32_t number; /* in the table, from 0 */
    uint64_t dims[8];
    uint64_t numel;
    uint64_t nnz;
    uint64_t base_fingerprint;
    uint64_t result_fingerprint;
    shd_section index;
    shd_section values;
    uint8_t rank; /* how many dims there are */
    uint8_t dtype;
    uint8_t op;
    uint8_t index_codec;
    uint8_t value_codec;
    uint8_t flags; /* enum shd_flags */
    uint8_t reserved[2];
} shd_tensor;

/* Reads record `number` (below file->tensor_count; they are in byte order of their names). */
SHD_API int shd_tensor_at(const shd_file *file, uint32_t number, shd_tensor *tensor, shd_status *status);

/* Finds a tensor by name, in O(log tensor_count). SHD_NOT_FOUND if there is none. */
SHD_API int shd_find(const shd_file *file, const char *name, size_t name_size, uint32_t *number);

/* ---- Loading ----------------------------------------------------------------------------------------------- */

/* How much shd_load() checks. Whatever it is, later calls never leave the caller's buffers. */
enum shd_check {
    SHD_CHECK_SIZES = 0, /* nothing that takes time, except for TILED and SEEDED */
    SHD_CHECK_CRC = 1,   /* the checksums of both sections */
    SHD_CHECK_ALL = 2,   /* everything: if it passes, and the file stays as it is, applying cannot fail */
    SHD_SCALAR = 16      /* to be added: do without SIMD, also in later calls (same results, for comparison) */
};

/* A tensor ready to be decoded. To be read, not written: `tensor` and `block_count` are of use.
 *
 * A *block* is what decodes without its neighbours: 2,048 unary bits for RICE, 2,048 elements for BITMAP and ALL,
 * 2,048 nonzeros for RAW, and all of a STRUCT. Blocks are numbered from 0 in order of their positions. TILED and
 * SEEDED are decoded when they are loaded, in the scratch buffer: what is loaded is RICE, and so says
 * tensor.index_codec. */
typedef struct shd_delta {
    shd_tensor tensor;
    uint64_t block_count;
    const uint8_t *index; /* decoded */
    const uint8_t *values;
    uint64_t unary_bits;
    uint64_t low_offset; /* in `index` */
    uint64_t unary_offset;
    uint32_t directory_offset;
    uint32_t k;
    uint32_t word; /* bytes of a directory word, 4 or 8 */
    uint32_t scalar;
} shd_delta;

/* The scratch buffer that shd_load() needs for this tensor: 0 unless the file is read through a callback, a section is
 * zstd, or the positions are TILED or SEEDED. */
SHD_API uint64_t shd_scratch_size(const shd_file *file, const shd_tensor *tensor);

/* The bytes of all positions of a tensor, and of its values or elements. One byte of a file may ask for 6,144 of them:
 * for a stranger's file, compare this and shd_scratch_size() with a limit before allocating. */
SHD_API uint64_t shd_decoded_size(const shd_tensor *tensor);

/* Makes tensor `number` ready. `check` is one of enum shd_check. `scratch` belongs to `delta` while it is used. */
SHD_API int shd_load(const shd_file *file, uint32_t number, int check, void *scratch, uint64_t scratch_size,
                     shd_delta *delta, shd_status *status);

/* Checks `count` tensors of these numbers completely, as loading with SHD_CHECK_ALL does, and keeps nothing: one call for
 * those that need no scratch buffer; others are SHD_BUFFER_TOO_SMALL. The status of the first that is refused. */
SHD_API int shd_check(const shd_file *file, const uint32_t *numbers, uint32_t count, shd_status *status);

/* Loads and checks every tensor, then the content digest: the full check of a file. `scratch` must do for the
 * tensor that needs most. */
SHD_API int shd_verify(const shd_file *file, void *scratch, uint64_t scratch_size, shd_status *status);

/* ---- Decoding ---------------------------------------------------------------------------------------------- */

/* How many nonzeros lie before `block`, which may be block_count. After SHD_CHECK_ALL blocks first to last - 1 hold
 * shd_block_rank(last) - shd_block_rank(first) nonzeros. */
SHD_API uint64_t shd_block_rank(const shd_delta *delta, uint64_t block);

/* The smallest block range that holds all nonzeros with first_position <= position < end_position. */
SHD_API int shd_find_blocks(const shd_delta *delta, uint64_t first_position, uint64_t end_position,
                            uint64_t *first_block, uint64_t *last_block);

/* Writes the positions of blocks [first_block, last_block) and their number. `capacity` is in elements. */
SHD_API int shd_positions(const shd_delta *delta, uint64_t first_block, uint64_t last_block, int64_t *positions,
                          uint64_t capacity, uint64_t *count, shd_status *status);

/* Writes the positions in [first_position, end_position), their number and the rank of the first: what a row range
 * holds is [first_row * row_size, end_row * row_size). With positions = NULL it only counts. On success the ranks
 * exist, even in a tensor that was not checked. */
SHD_API int shd_positions_between(const shd_delta *delta, uint64_t first_position, uint64_t end_position,
                                  int64_t *positions, uint64_t capacity, uint64_t *first_rank, uint64_t *count,
                                  shd_status *status);

/* Writes the values of the nonzeros of rank first_rank to first_rank + count - 1 as binary32 (ADD only). */
SHD_API int shd_values(const shd_delta *delta, uint64_t first_rank, uint64_t count, float *values, shd_status *status);

/* The same for SET and NEW: elements of the tensor's dtype, as they are stored (count * shd_dtype_size bytes). For ULP:
 * the shifts, as signed integers of the elements' size. */
SHD_API int shd_elements(const shd_delta *delta, uint64_t first_rank, uint64_t count, void *elements,
                         shd_status *status);

/* ---- Decoding with the base (FORMAT.md, sections 4.7 and 5.2) ---------------------------------------------- */

/* SHD_INDEX_FROM_BASE and SHD_VALUES_ULP_FROM_BASE are for files on their way to somebody who has the base: its elements
 * tell the positions, and the values. shd_load() refuses such a tensor: SHD_BASE_NEEDED. Here sections are decoded by
 * themselves: the bytes that shd_tensor's `index` and `values` say, after zstd, checked with shd_crc32() before. Whoever
 * keeps the delta writes it anew, with RICE and ULP.
 *
 * A damaged section has the reason codes of the format; SHD_WRONG_BASE is one that was made for other elements. But one
 * that fits other elements by chance gives other positions: compare a fingerprint or the digest. */

/* Reads a FROM_BASE section tile by tile. To be read, not written. */
typedef struct shd_from_base {
    uint64_t next_position; /* the first element of the next tile */
    uint64_t next_count;    /* its elements, at most 1,048,576; 0 at the end, and after an error */
    uint64_t nnz;
    uint64_t rank; /* nonzeros of the tiles before it */
    void *state;
} shd_from_base;

/* The scratch buffer, of any alignment, that a section needs: 48 KiB, and a byte for each column. */
SHD_API uint64_t shd_from_base_scratch_size(const void *section, uint64_t size);

/* Takes a section apart. `section` and `scratch` belong to `reader` while it is used. */
SHD_API int shd_from_base_open(shd_from_base *reader, const void *section, uint64_t size, uint64_t numel, uint64_t nnz,
                               void *scratch, uint64_t scratch_size);

/* Decodes the next tile, given the base's elements in it: [next_position, next_position + next_count). Writes the
 * positions of its nonzeros, which increase, and their number. `capacity` is at least the smaller of next_count and
 * nnz - rank. The last tile is refused where anything of the section was wrong. */
SHD_API int shd_from_base_next(shd_from_base *reader, const void *elements, uint32_t element_size, int64_t *positions,
                               uint64_t capacity, uint64_t *count);

/* Decodes a ULP_FROM_BASE section, given the base's elements at the positions, in order; any alignment will do. Writes
 * the shifts as signed integers of the elements' size; on an error, anything. */
SHD_API int shd_ulp_from_base_decode(const void *section, uint64_t size, const void *elements, uint32_t element_size,
                                     uint64_t count, void *shifts);

/* ---- Applying ---------------------------------------------------------------------------------------------- */

/* The weights to be patched: elements [first_position, first_position + count) of the tensor. That is all of it with
 * first_position = 0 and count = tensor.numel, or a run of its rows (a shard); nonzeros outside are passed over. */
typedef struct shd_weights {
    void *data; /* aligned to its elements; host byte order */
    uint64_t first_position;
    uint64_t count;
    int32_t dtype;
    int32_t any_dtype; /* not 0: let ADD apply to F32, F16 and BF16 whatever dtype the delta was made against */
} shd_weights;

/* Applies blocks [first_block, last_block) to the weights: ADD with `strength` (rounded to binary32), SET, ULP and NEW
 * with strength 1.
 *
 * `saved` receives what is overwritten, at its rank: it has room for tensor.nnz elements of the weights' dtype, and
 * is the same for all block ranges. It may be NULL if nothing is ever to be taken back.
 *
 * On an error the weights are as they were before the call (given `saved`, and a file that does not change). After
 * SHD_CHECK_ALL only ULP can fail, with SHD_OUT_OF_RANGE, and only on another base than its own. Whoever applies it in
 * several calls reverts those that went well. */
SHD_API int shd_apply(const shd_delta *delta, const shd_weights *weights, double strength, uint64_t first_block,
                      uint64_t last_block, void *saved, shd_status *status);

/* The scratch buffer, of any alignment, that shd_apply_sum() needs for so many deltas: 257 KiB, and 17 for each. */
SHD_API uint64_t shd_sum_scratch_size(uint32_t count);

/* Applies several deltas at once, all of them ADD: to each element goes the sum of what they contribute, rounded once
 * (FORMAT.md, section 6.2). `deltas` are in the order in which contributions are summed: that of their files' digests.
 *
 * deltas[i] is applied with strengths[i] and saves what it overwrites in saved[i], as shd_apply() does: where deltas
 * overlap, each has the base's elements. So every one is taken back by shd_revert(), in any order. No saved[i] may be
 * NULL, but of a delta without nonzeros.
 *
 * With `from_saved` not 0 the base's elements are not read from the weights but from where they were saved before: the
 * same deltas are on the weights already, and get other strengths.
 *
 * Work is divided by the weights: several threads may do disjoint parts of a tensor at a time, each with a
 * `shd_weights` and a scratch buffer of its own, and the same `saved`.
 *
 * On an error the weights are as they were before the call (given a file that does not change); with `from_saved`
 * they are the base's up to some element, and as they were from there on: shd_revert() leads back. */
SHD_API int shd_apply_sum(const shd_delta *const *deltas, const double *strengths, void *const *saved, uint32_t count,
                          const shd_weights *weights, int from_saved, void *scratch, uint64_t scratch_size,
                          shd_status *status);

/* Puts back what shd_apply() of the same blocks, or shd_apply_sum(), has saved. */
SHD_API int shd_revert(const shd_delta *delta, const shd_weights *weights, uint64_t first_block, uint64_t last_block,
                       const void *saved, shd_status *status);

/* ---- Fingerprints (FORMAT.md, section 6.3) ----------------------------------------------------------------- */

/* Sums over the listed positions of blocks [first_block, last_block) that lie in the weights. The sums of disjoint
 * ranges, added modulo 2^64, are that of their union; that of all blocks compares with base_fingerprint. */
SHD_API int shd_fingerprint(const shd_delta *delta, const shd_weights *weights, uint64_t first_block,
                            uint64_t last_block, uint64_t *fingerprint, shd_status *status);

/* Over elements given one by one: elements[i] is at positions[i], or at first_position + i if positions is NULL
 * (a whole tensor, for NEW and DROP, and the one that REPLACE takes away). `element_size` is 1, 2, 4 or 8, and `elements` aligned to it. */
SHD_API int shd_fingerprint_elements(const int64_t *positions, uint64_t first_position, const void *elements,
                                     uint64_t count, uint32_t element_size, uint64_t *fingerprint);

/* ---- Encoding (FORMAT.md, section 8) ----------------------------------------------------------------------- */

/* The canonical RICE section of a list of positions. */
typedef struct shd_rice {
    uint64_t numel;
    uint64_t count;      /* nonzeros */
    uint64_t unary_bits; /* U */
    uint64_t size;       /* bytes of the section */
    uint32_t k;
    uint32_t word;
} shd_rice;

/* Whether the library decodes an index codec. */
SHD_API int shd_knows_index_codec(int index_codec);

/* Chooses k and computes the size. `count` is at least 1; positions must be strictly increasing (SHD_POSITION_ORDER)
 * and lie in [0, numel) (SHD_POSITION_RANGE). */
SHD_API int shd_rice_plan(const int64_t *positions, uint64_t count, uint64_t numel, shd_rice *plan);

/* Writes plan->size bytes. The positions must be those of the plan; if not, SHD_INVALID_ARGUMENT. */
SHD_API int shd_rice_encode(const shd_rice *plan, const int64_t *positions, void *section, uint64_t capacity);

/* How TILED sees a tensor (FORMAT.md, section 4.6): as a matrix, with classes of rows and columns and a k for each pair. */
typedef struct shd_tiled {
    uint64_t numel;
    uint64_t columns;              /* divides numel */
    const uint8_t *k;              /* 2^(row_bits + column_bits), by row class, then by column class */
    const uint8_t *row_classes;    /* numel / columns */
    const uint8_t *column_classes; /* columns */
    uint32_t tile_rows;
    uint32_t row_bits;    /* of a class, 1 to 4 */
    uint32_t column_bits; /* the same */
} shd_tiled;

/* The scratch buffer, of any alignment, that shd_tiled_encode() needs; 0 for what is no such matrix. */
SHD_API uint64_t shd_tiled_scratch_size(const shd_tiled *grid);

/* Writes the TILED section of a list of positions, as shd_rice_plan() takes them, and its size. With section = NULL it only
 * computes the size. */
SHD_API int shd_tiled_encode(const shd_tiled *grid, const int64_t *positions, uint64_t count, void *scratch,
                             uint64_t scratch_size, void *section, uint64_t capacity, uint64_t *size);

/* How FROM_BASE sees a tensor (section 4.7): as a matrix, with classes of rows, columns and the base's elements. */
typedef struct shd_base_grid {
    uint64_t numel;
    uint64_t columns;              /* divides numel */
    const uint16_t *thresholds;    /* classes - 1, none smaller than the one before it */
    const uint8_t *groups;         /* k, and 128 if it is turned, by row class, then column class, then class of element */
    const uint8_t *row_classes;    /* numel / columns; unused if row_bits is 0 */
    const uint8_t *column_classes; /* columns; unused if column_bits is 0 */
    uint32_t classes;              /* of elements, 1 to 16 */
    uint32_t tile_rows;
    uint32_t row_bits;    /* of a class, 0 to 4 */
    uint32_t column_bits; /* the same */
} shd_base_grid;

/* The scratch buffer, of any alignment, that shd_from_base_plan() needs; 0 for what is no such matrix. */
SHD_API uint64_t shd_from_base_plan_size(const shd_base_grid *grid);

/* Computes the size of the FROM_BASE section of a list of positions, as shd_rice_plan() takes them, given all of the
 * base's elements, and makes `scratch` a plan of it. */
SHD_API int shd_from_base_plan(const shd_base_grid *grid, const void *elements, uint32_t element_size,
                               const int64_t *positions, uint64_t count, void *scratch, uint64_t scratch_size,
                               uint64_t *size);

/* Writes the section. All but `section` is what it was when `scratch` became its plan. */
SHD_API int shd_from_base_encode(const shd_base_grid *grid, const void *elements, uint32_t element_size,
                                 const int64_t *positions, uint64_t count, void *scratch, void *section,
                                 uint64_t capacity);

/* What choosing such classes takes: elements of each key (section 4.7), counts[0..32767]; */
SHD_API int shd_key_counts(const void *elements, uint64_t count, uint32_t element_size, uint64_t *counts);

/* elements of each class in each row and in each column, by line, then by class, given thresholds (the grid's groups and
 * classes of lines are not looked at); */
SHD_API int shd_line_counts(const shd_base_grid *grid, const void *elements, uint32_t element_size, uint64_t *of_rows,
                            uint64_t *of_columns);

/* and of each class of row, column and element, in the order of the grid's groups, which may be NULL. */
SHD_API int shd_joint_counts(const shd_base_grid *grid, const void *elements, uint32_t element_size, uint64_t *counts);

/* Bytes of the decoded VALUES section of `count` nonzeros; 0 for a codec that the library does not know. `dtype` matters
 * for SHD_VALUES_BITS only. For SHD_VALUES_ULP the least: the section says how many it has. */
SHD_API uint64_t shd_values_size(int value_codec, int dtype, uint64_t count);

/* Writes the VALUES section of F32, F16, BF16, I8, I4 or SIGN: shd_values_size() bytes. Values that are not finite,
 * or become so, or that the codec cannot hold: SHD_VALUES_DO_NOT_FIT. */
SHD_API int shd_values_encode(int value_codec, const float *values, uint64_t count, void *section, uint64_t capacity);

/* How many of x[0..n-1] have |x| >= threshold (NaN has not). */
SHD_API uint64_t shd_count_at_least(const float *x, uint64_t n, float threshold);

/* Writes first_position + i for every such x[i], in order, and their number. SHD_BUFFER_TOO_SMALL if there are more
 * than `capacity`. */
SHD_API int shd_select_at_least(const float *x, uint64_t n, float threshold, uint64_t first_position,
                                int64_t *positions, uint64_t capacity, uint64_t *count);

/* The CRC-32 of zlib. Start with crc = 0; the result continues one. */
SHD_API uint32_t shd_crc32(uint32_t crc, const void *data, size_t size);

/* ---- For bindings ------------------------------------------------------------------------------------------ */

enum shd_struct {
    SHD_STRUCT_STATUS,
    SHD_STRUCT_FILE,
    SHD_STRUCT_TENSOR,
    SHD_STRUCT_DELTA,
    SHD_STRUCT_WEIGHTS,
    SHD_STRUCT_RICE,
    SHD_STRUCT_TILED,
    SHD_STRUCT_FROM_BASE,
    SHD_STRUCT_BASE_GRID
};

/* sizeof a struct of this header as the library knows it, for a binding to compare with its own; 0 if unknown. */
SHD_API size_t shd_struct_size(int which);

/* The instructions that calls on this machine use: "avx2", "neon" or "scalar". */
SHD_API const char *shd_simd(void);

#ifdef __cplusplus
}
#endif

#endif
