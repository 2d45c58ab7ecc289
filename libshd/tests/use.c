#include "use.h"

#include <string.h>

#define GUARD 64  /* words before and behind the weights */
#define WORDS 8192 /* of the weights, at most */

static uint64_t memory[GUARD + WORDS + GUARD], saved[WORDS];

static int guards_are_intact(void) {
    int intact = 1;
    for (uint64_t i = 0; i < GUARD; i++) {
        intact &= memory[i] == UINT64_C(0x5A5A5A5A5A5A5A5A);
        intact &= memory[GUARD + WORDS + i] == UINT64_C(0x5A5A5A5A5A5A5A5A);
    }
    return intact;
}

static int use_tensor(const shd_delta *delta, int is_checked) {
    static int64_t positions[WORDS];
    static float values[WORDS];
    const shd_tensor *t = &delta->tensor;
    uint64_t count, sum, rank, blocks = delta->block_count;
    int dtype = t->dtype == SHD_UNSPECIFIED ? SHD_F32 : t->dtype;
    if (t->numel > WORDS || t->nnz > WORDS) {
        return 1;
    }
    shd_weights weights = {memory + GUARD, 0, t->numel, dtype, 0};
    int code = shd_apply(delta, &weights, 1, 0, blocks, saved, NULL);
    (void)shd_revert(delta, &weights, 0, blocks, saved, NULL);
    (void)shd_fingerprint(delta, &weights, 0, blocks, &sum, NULL);
    (void)shd_positions(delta, 0, blocks, positions, t->nnz, &count, NULL);
    (void)shd_positions_between(delta, t->numel / 3, t->numel / 2, positions, t->nnz, &rank, &count, NULL);
    (void)shd_values(delta, 0, t->nnz, values, NULL);
    (void)shd_elements(delta, 0, t->nnz, saved, NULL);
    for (uint64_t block = 0; block < blocks; block++) {
        (void)shd_apply(delta, &weights, 1, block, block + 1, saved, NULL);
    }
    return !is_checked || code == SHD_OK || (code == SHD_WRONG_OPERATION && t->op == SHD_OP_DROP);
}

int use_file(const uint8_t *data, uint64_t size, int check) {
    shd_file file;
    int as_promised = 1;
    if (shd_open(&file, data, size, NULL) != SHD_OK) {
        return 1;
    }
    memset(memory, 0x5A, GUARD * sizeof *memory);
    memset(memory + GUARD + WORDS, 0x5A, GUARD * sizeof *memory);
    for (uint32_t number = 0; number < file.tensor_count; number++) {
        shd_delta delta;
        if (shd_load(&file, number, check, NULL, 0, &delta, NULL) == SHD_OK) {
            as_promised &= use_tensor(&delta, (check & SHD_CHECK_ALL) != 0);
        }
    }
    (void)shd_verify(&file, NULL, 0, NULL);
    return as_promised && guards_are_intact();
}
