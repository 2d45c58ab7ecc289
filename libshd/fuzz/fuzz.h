/* What the fuzz targets share. An input is a .shd file as it stands: what is found is a vector for spec/vectors. */
#ifndef FUZZ_H
#define FUZZ_H

#include "../tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* libFuzzer's side. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed);

/* Tensors with more elements or nonzeros are not decoded. */
#define FUZZ_MOST 8192

/* A promise of the library: abort() is what libFuzzer reports. */
#define PROMISE(condition)                                                                \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);       \
            abort();                                                                      \
        }                                                                                 \
    } while (0)

/* Exactly so many bytes on the heap, so that the address sanitizer sees the first that is too many. */
void *exactly(uint64_t size);

/* A cheap stand-in for zstd, so that its paths are taken: it repeats the source. */
int fake_zstd(void *context, const void *source, size_t source_size, void *result, size_t size);

/* An open file's tensor, loaded into a scratch buffer of exactly the size that it needs. */
typedef struct loaded {
    shd_delta delta;
    shd_status status;
    void *scratch;
    int code;
} loaded;

loaded load(const shd_file *file, uint32_t number, int check);

#endif
