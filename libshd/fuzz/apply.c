/* Patching: no write beyond the weights, all or nothing, taken back exactly, in one go as in parts, and with a file
 * that changes after it was checked. */
#include "fuzz.h"

/* Weights, what is expected of them, and room for what is overwritten; each takes exactly its size. */
typedef struct buffers {
    uint8_t *weights, *before, *expected, *saved;
    uint64_t size; /* of all weights */
    uint32_t element;
    shd_weights target;
} buffers;

static buffers make_buffers(const shd_tensor *tensor) {
    int dtype = tensor->dtype == SHD_UNSPECIFIED ? SHD_F32 : tensor->dtype;
    buffers b = {.element = shd_dtype_size(dtype)};
    b.size = tensor->numel * b.element;
    b.weights = exactly(b.size);
    b.before = exactly(b.size);
    b.expected = exactly(b.size);
    b.saved = exactly(tensor->nnz * b.element);
    shd_weights target = {b.weights, 0, tensor->numel, dtype, 0};
    b.target = target;
    for (uint64_t i = 0; i < b.size; i++) {
        b.before[i] = (uint8_t)(0x9E3779B97F4A7C15u * (i + tensor->nnz) >> 24);
    }
    return b;
}

static void give_buffers(buffers *b) {
    free(b->weights);
    free(b->before);
    free(b->expected);
    free(b->saved);
}

static int is(const uint8_t *a, const uint8_t *b, uint64_t size) { return size == 0 || memcmp(a, b, size) == 0; }

static void start_again(const buffers *b) {
    if (b->size != 0) {
        memcpy(b->weights, b->before, b->size);
    }
}

static int apply_all(const shd_delta *delta, const buffers *b) {
    return shd_apply(delta, &b->target, 0.75 + 0.25 * (delta->tensor.op != SHD_OP_ADD), 0, delta->block_count,
                     b->saved, NULL);
}

/* The same by blocks, the last first, and by two shards, one of them a buffer of its own. */
static void apply_in_parts(const shd_delta *delta, const buffers *b, double strength) {
    start_again(b);
    for (uint64_t block = delta->block_count; block-- > 0;) {
        PROMISE(shd_apply(delta, &b->target, strength, block, block + 1, b->saved, NULL) == SHD_OK);
    }
    PROMISE(is(b->weights, b->expected, b->size));
    uint64_t first = delta->tensor.numel / 3, count = delta->tensor.numel / 2 - first, sum, first_block, last_block;
    shd_weights shard = b->target;
    shard.data = exactly(count * b->element);
    shard.first_position = first;
    shard.count = count;
    if (count != 0) {
        memcpy(shard.data, b->before + first * b->element, count * b->element);
    }
    PROMISE(shd_find_blocks(delta, first, first + count, &first_block, &last_block) == SHD_OK);
    PROMISE(shd_apply(delta, &shard, strength, first_block, last_block, NULL, NULL) == SHD_OK);
    PROMISE(is(shard.data, b->expected + first * b->element, count * b->element));
    PROMISE(shd_fingerprint(delta, &shard, first_block, last_block, &sum, NULL) == SHD_OK);
    free(shard.data);
}

static void check_fingerprint(const shd_delta *delta, const buffers *b) {
    uint64_t whole, part, sum = 0;
    PROMISE(shd_fingerprint(delta, &b->target, 0, delta->block_count, &whole, NULL) == SHD_OK);
    for (uint64_t block = 0; block < delta->block_count; block++) {
        PROMISE(shd_fingerprint(delta, &b->target, block, block + 1, &part, NULL) == SHD_OK);
        sum += part;
    }
    PROMISE(sum == whole);
}

static void check_result(const shd_delta *delta, const shd_delta *scalar, const buffers *b) {
    const shd_tensor *tensor = &delta->tensor;
    double strength = 0.75 + 0.25 * (tensor->op != SHD_OP_ADD);
    start_again(b);
    check_fingerprint(delta, b);
    int code = apply_all(delta, b);
    PROMISE(code == (tensor->op == SHD_OP_DROP ? SHD_WRONG_OPERATION : SHD_OK) ||
            (tensor->op == SHD_OP_ULP && code == SHD_OUT_OF_RANGE));
    if (code != SHD_OK) {
        PROMISE(is(b->weights, b->before, b->size));
        PROMISE(shd_apply(delta, &b->target, strength, 0, delta->block_count, NULL, NULL) == code);
        PROMISE(is(b->weights, b->before, b->size));
        return;
    }
    if (b->size != 0) {
        memcpy(b->expected, b->weights, b->size);
    }
    PROMISE(shd_revert(delta, &b->target, 0, delta->block_count, b->saved, NULL) == SHD_OK);
    PROMISE(is(b->weights, b->before, b->size));
    PROMISE(apply_all(scalar, b) == SHD_OK && is(b->weights, b->expected, b->size));
    apply_in_parts(delta, b, strength);
}

/* What the fuzzer has shd_apply_sum() do: the tensor with itself, as often as this. */
#define ADDENDS 3u

static int apply_sum(const shd_delta *delta, const shd_weights *target, void *const saved[ADDENDS], int from_saved) {
    const shd_delta *deltas[ADDENDS] = {delta, delta, delta};
    const double strengths[ADDENDS] = {0.75, -3, 1e38};
    const uint64_t size = shd_sum_scratch_size(ADDENDS);
    void *scratch = exactly(size);
    int code = shd_apply_sum(deltas, strengths, saved, ADDENDS, target, from_saved, scratch, size, NULL);
    free(scratch);
    return code;
}

/* In one go as in parts, from what was saved as from the weights, with SIMD as without; taken back exactly. */
static void check_sum(const shd_delta *delta, const shd_delta *scalar, const buffers *b) {
    const uint64_t size = delta->tensor.nnz * b->element;
    uint8_t *saved[ADDENDS];
    void *rooms[ADDENDS];
    for (uint32_t i = 0; i < ADDENDS; i++) {
        rooms[i] = saved[i] = exactly(size);
    }
    start_again(b);
    int code = apply_sum(delta, &b->target, rooms, 0);
    PROMISE(code == (delta->tensor.op == SHD_OP_ADD ? SHD_OK : SHD_WRONG_OPERATION));
    if (code == SHD_OK) {
        if (b->size != 0) {
            memcpy(b->expected, b->weights, b->size);
        }
        PROMISE(is(saved[0], saved[1], size) && is(saved[0], saved[2], size));
        PROMISE(apply_sum(scalar, &b->target, rooms, 1) == SHD_OK && is(b->weights, b->expected, b->size));
        PROMISE(shd_revert(delta, &b->target, 0, delta->block_count, saved[1], NULL) == SHD_OK);
        PROMISE(is(b->weights, b->before, b->size));
        for (uint64_t first = 0, end; first < b->target.count; first = end) {
            end = first + 1 + (b->target.count - first) / 2;
            shd_weights part = b->target;
            part.data = b->weights + first * b->element;
            part.first_position = first;
            part.count = end - first;
            PROMISE(apply_sum(delta, &part, rooms, 0) == SHD_OK);
        }
        PROMISE(is(b->weights, b->expected, b->size));
    }
    for (uint32_t i = 0; i < ADDENDS; i++) {
        free(saved[i]);
    }
}

/* A tensor that was not checked: an error leaves all as it was. */
static void use_unchecked(const shd_delta *delta, const buffers *b) {
    uint64_t sum;
    start_again(b);
    if (apply_all(delta, b) != SHD_OK) {
        PROMISE(is(b->weights, b->before, b->size));
    }
    (void)shd_revert(delta, &b->target, 0, delta->block_count, b->saved, NULL);
    (void)shd_fingerprint(delta, &b->target, 0, delta->block_count, &sum, NULL);
    void *const rooms[ADDENDS] = {b->saved, b->saved, b->saved}; /* each saves the same */
    start_again(b);
    if (apply_sum(delta, &b->target, rooms, 0) != SHD_OK) {
        PROMISE(is(b->weights, b->before, b->size));
    }
}

/* The file's bytes change under a tensor that passed: the sanitizers watch. */
static void use_changed(const shd_delta *delta, const buffers *b, bytes copy) {
    random_state r = {delta->tensor.nnz + copy.size};
    void *const rooms[ADDENDS] = {b->saved, b->saved, b->saved};
    const shd_section *sections[] = {&delta->tensor.index, &delta->tensor.values};
    for (int i = 0; i < 3; i++) {
        const shd_section *s = sections[random_bits(&r) % 2];
        if (s->stored != 0) {
            copy.data[s->offset + random_bits(&r) % s->stored] ^= (uint8_t)random_bits(&r);
        }
        (void)apply_all(delta, b);
        (void)shd_revert(delta, &b->target, 0, delta->block_count, b->saved, NULL);
        (void)apply_sum(delta, &b->target, rooms, i == 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    shd_file file;
    if (shd_open(&file, data, size, NULL) != SHD_OK) {
        return 0;
    }
    bytes copy = {exactly(size), size};
    memcpy(copy.data, data, size);
    PROMISE(shd_open(&file, copy.data, size, NULL) == SHD_OK);
    shd_set_zstd(&file, fake_zstd, NULL);
    for (uint32_t number = 0; number < file.tensor_count && number < 32; number++) {
        shd_tensor tensor;
        PROMISE(shd_tensor_at(&file, number, &tensor, NULL) == SHD_OK);
        if (tensor.numel > FUZZ_MOST) {
            continue;
        }
        buffers b = make_buffers(&tensor);
        loaded simd = load(&file, number, SHD_CHECK_ALL), scalar = load(&file, number, SHD_CHECK_ALL | SHD_SCALAR);
        loaded unchecked = load(&file, number, SHD_CHECK_SIZES);
        if (unchecked.code == SHD_OK) {
            use_unchecked(&unchecked.delta, &b);
        }
        if (simd.code == SHD_OK) {
            check_result(&simd.delta, &scalar.delta, &b);
            check_sum(&simd.delta, &scalar.delta, &b);
            use_changed(&simd.delta, &b, copy);
        }
        free(simd.scratch);
        free(scalar.scratch);
        free(unchecked.scratch);
        give_buffers(&b);
    }
    free(copy.data);
    return 0;
}
