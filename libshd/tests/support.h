/* What tests and benchmarks need to make deltas: memory, random numbers, positions, files. */
#ifndef SUPPORT_H
#define SUPPORT_H

#include <shd.h>

/* Zeroed memory for the test itself, 64-byte aligned; ends the program if there is none. */
void *take(size_t size);
void give(void *memory);

typedef struct random_state {
    uint64_t state;
} random_state;

uint64_t random_bits(random_state *r);
double random_unit(random_state *r); /* in [0, 1) */

/* Each position below numel with probability `density`; returns how many. `positions` has room for `capacity`. */
uint64_t random_positions(random_state *r, uint64_t numel, double density, int64_t *positions, uint64_t capacity);

/* Values of about the size that fine-tuning changes weights by, of either sign. */
void random_values(random_state *r, float *values, uint64_t count);

/* A tensor to be put into a file; its sections as they are stored. */
typedef struct tensor_spec {
    const char *name;
    uint8_t rank, dtype, op, index_codec, value_codec, flags;
    uint64_t dims[8];
    uint64_t nnz;
    uint64_t base_fingerprint, result_fingerprint;
    const void *index;
    uint64_t index_size, index_decoded; /* decoded 0: not zstd */
    const void *values;
    uint64_t values_size, values_decoded;
} tensor_spec;

typedef struct bytes {
    uint8_t *data;
    uint64_t size;
} bytes;

/* A file of these tensors; `incompatible` is the header's word, `metadata` may be NULL. Its digest is zero. */
bytes build_file(const tensor_spec *tensors, uint32_t count, uint64_t incompatible, const void *metadata,
                 uint64_t metadata_size);

/* Makes the checksums of the header and of the four sections of the file right again after a change. */
void fix_checksums(bytes file);

/* Those of the tensors' sections, too. The file has at least 128 bytes. */
void fix_all_checksums(bytes file);

/* Those of a packed file: of CONTROL, of REST and of the header. */
void fix_packed_checksums(bytes file);

bytes encode_positions(const int64_t *positions, uint64_t count, uint64_t numel);
bytes encode_values(int value_codec, const float *values, uint64_t count);

/* The value codecs that the library encodes floats with: all but BITS, in order of id. */
typedef struct codec_list {
    int count;
    int ids[256];
} codec_list;

codec_list float_codecs(void);

/* One tensor [rows, columns] of RICE and `value_codec`, at random positions. */
typedef struct sample {
    bytes file;
    uint64_t numel, nnz;
    int64_t *positions;
    float *values; /* before encoding */
} sample;

sample build_sample(uint64_t seed, uint64_t rows, uint64_t columns, double density, int value_codec, int dtype);
void give_sample(sample *s);

#endif
