/* Files that lie. Nothing is expected of them but that no call leaves its buffers: run this under the sanitizers. */
#include "check.h"
#include "support.h"
#include "use.h"

#include <string.h>

/* One tensor of each index codec. */
static bytes build_all_codecs(void) {
    static int64_t positions[600];
    static float few[600];
    static uint32_t raw[4] = {5, 90}, bitmap[1 + 4 + 2] = {0, 0x80000001, 0, 0xF0, 0};
    static const uint64_t lines[] = {0, 1, 2, 2, 1, 3, 1, 1, 2, 0, 1, 1, 0};
    random_state r = {77};
    for (int64_t i = 0; i < 600; i++) {
        positions[i] = 9 * i + (int64_t)(random_bits(&r) % 9);
    }
    random_values(&r, few, 600);
    bytes rice = encode_positions(positions, 600, 5400), rice_wide = encode_positions(positions, 2, 5400);
    bytes i8 = encode_values(SHD_VALUES_I8, few, 600), i4 = encode_values(SHD_VALUES_I4, few, 2);
    bytes sign = encode_values(SHD_VALUES_SIGN, few, 6), f16 = encode_values(SHD_VALUES_F16, few, 20);
    bytes f32 = encode_values(SHD_VALUES_F32, few, 3), bits = {take(12), 12};
    tensor_spec t[] = {
        {.name = "all", .rank = 1, .dims = {3}, .dtype = SHD_F32, .index_codec = SHD_INDEX_ALL,
         .value_codec = SHD_VALUES_F32, .nnz = 3, .values = f32.data, .values_size = f32.size},
        {.name = "bitmap", .rank = 1, .dims = {100}, .dtype = SHD_BF16, .index_codec = SHD_INDEX_BITMAP,
         .value_codec = SHD_VALUES_SIGN, .nnz = 6, .index = bitmap, .index_size = sizeof bitmap,
         .values = sign.data, .values_size = sign.size},
        {.name = "drop", .rank = 2, .dims = {8, 8}, .dtype = SHD_F32, .op = SHD_OP_DROP},
        {.name = "raw", .rank = 1, .dims = {100}, .dtype = SHD_F16, .index_codec = SHD_INDEX_RAW,
         .value_codec = SHD_VALUES_I4, .nnz = 2, .index = raw, .index_size = sizeof raw,
         .values = i4.data, .values_size = i4.size},
        {.name = "replace", .rank = 1, .dims = {3}, .dtype = SHD_U8, .op = SHD_OP_REPLACE,
         .index_codec = SHD_INDEX_ALL, .value_codec = SHD_VALUES_BITS, .nnz = 3, .values = bits.data,
         .values_size = 12},
        {.name = "rice", .rank = 2, .dims = {54, 100}, .dtype = SHD_BF16, .index_codec = SHD_INDEX_RICE,
         .value_codec = SHD_VALUES_I8, .nnz = 600, .index = rice.data, .index_size = rice.size,
         .values = i8.data, .values_size = i8.size},
        {.name = "set", .rank = 1, .dims = {5400}, .dtype = SHD_U16, .op = SHD_OP_SET,
         .index_codec = SHD_INDEX_RICE, .value_codec = SHD_VALUES_BITS, .nnz = 2, .index = rice_wide.data,
         .index_size = rice_wide.size, .values = bits.data, .values_size = 12},
        {.name = "struct", .rank = 2, .dims = {5, 7}, .index_codec = SHD_INDEX_STRUCT,
         .value_codec = SHD_VALUES_F16, .nnz = 20, .index = lines, .index_size = sizeof lines,
         .values = f16.data, .values_size = f16.size},
    };
    bytes file = build_file(t, sizeof t / sizeof t[0], 0, "\1\0\0\0\1\0\0\0kv", 10);
    bytes all[] = {rice, rice_wide, i8, i4, sign, f16, f32, bits};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        give(all[i].data);
    }
    return file;
}

static void test_truncated(bytes f) {
    for (uint64_t size = 0; size < f.size; size++) {
        uint8_t *copy = take(size);
        memcpy(copy, f.data, size);
        shd_file file;
        CHECK(shd_open(&file, copy, size, NULL) != SHD_OK);
        give(copy);
    }
}

static void test_changed(bytes f) {
    static const uint8_t changes[] = {0x01, 0x80, 0xFF};
    bytes copy = {take(f.size), f.size};
    for (uint64_t offset = 0; offset < f.size; offset++) {
        /* In brief one of the changes, each time the next. */
        for (size_t i = is_brief ? offset % 3 : 0; i < 3; i += is_brief ? 3 : 1) {
            memcpy(copy.data, f.data, f.size);
            copy.data[offset] ^= changes[i];
            CHECK(use_file(copy.data, copy.size, SHD_CHECK_ALL)); /* the checksums are wrong */
            fix_all_checksums(copy);
            CHECK(use_file(copy.data, copy.size, SHD_CHECK_ALL));
            CHECK(use_file(copy.data, copy.size, SHD_CHECK_SIZES));
            CHECK(use_file(copy.data, copy.size, SHD_CHECK_SIZES | SHD_SCALAR));
        }
    }
    give(copy.data);
}

static void test_changed_at_random(bytes f) {
    bytes copy = {take(f.size), f.size};
    random_state r = {88};
    for (int trial = 0; trial < (is_brief ? 2000 : 20000); trial++) {
        memcpy(copy.data, f.data, f.size);
        uint64_t changes = 1 + random_bits(&r) % 4;
        for (uint64_t i = 0; i < changes; i++) {
            uint64_t offset = random_bits(&r) % f.size;
            static const uint8_t interesting[] = {0, 1, 0x7F, 0x80, 0xFF};
            uint64_t what = random_bits(&r) % 8;
            copy.data[offset] = what < 5 ? interesting[what] : (uint8_t)random_bits(&r);
        }
        fix_all_checksums(copy);
        CHECK(use_file(copy.data, copy.size, trial % 2 ? SHD_CHECK_ALL : SHD_CHECK_SIZES));
    }
    give(copy.data);
}

#define GUARD 64

/* The file changes after it was loaded, as a mapping can. */
static void test_changed_after_loading(void) {
    sample s = build_sample(99, 50, 400, 0.1, SHD_VALUES_I8, SHD_BF16);
    random_state r = {3};
    uint16_t *memory = take((s.numel + 2 * GUARD) * 2), *saved = take(s.nnz * 2);
    uint8_t *intact = take(s.file.size);
    memcpy(intact, s.file.data, s.file.size);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(shd_open(&file, s.file.data, s.file.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    shd_weights weights = {memory + GUARD, 0, s.numel, SHD_BF16, 0};
    for (int trial = 0; trial < (is_brief ? 500 : 3000); trial++) {
        memcpy(s.file.data, intact, s.file.size);
        for (int i = 0; i < 3; i++) {
            s.file.data[random_bits(&r) % s.file.size] = (uint8_t)random_bits(&r);
        }
        (void)shd_apply(&delta, &weights, 1, 0, delta.block_count, saved, NULL);
        for (int i = 0; i < GUARD; i++) {
            CHECK(memory[i] == 0 && memory[GUARD + s.numel + (uint64_t)i] == 0);
        }
        uint32_t number;
        shd_tensor tensor;
        (void)shd_find(&file, "weight", 6, &number);
        (void)shd_tensor_at(&file, 0, &tensor, NULL);
    }
    give(memory);
    give(saved);
    give(intact);
    give_sample(&s);
}

/* The tables of codecs end in a refusal by name, whatever a caller has made of a delta. */
static void test_unknown_ids(void) {
    sample s = build_sample(40, 50, 400, 0.1, SHD_VALUES_I8, SHD_BF16);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(shd_open(&file, s.file.data, s.file.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    float value;
    int64_t *positions = take(s.nnz * sizeof *positions);
    uint16_t *memory = take(s.numel * sizeof *memory);
    uint8_t section[64];
    uint64_t first, last;
    shd_weights weights = {memory, 0, s.numel, SHD_BF16, 0};
    int unknown = 0;
    for (int id = 1; id < 256; id++) {
        shd_delta changed = delta;
        if (shd_values_size(id, SHD_F32, 1) == 0) {
            changed.tensor.value_codec = (uint8_t)id;
            CHECK_CODE(shd_values(&changed, 0, 1, &value, NULL), SHD_UNKNOWN_VALUE_CODEC);
            CHECK_CODE(shd_apply(&changed, &weights, 1, 0, delta.block_count, NULL, NULL), SHD_UNKNOWN_VALUE_CODEC);
            CHECK_CODE(shd_values_encode(id, &value, 1, section, sizeof section), SHD_WRONG_OPERATION);
            unknown++;
        }
        changed = delta;
        if (!shd_knows_index_codec(id)) {
            changed.tensor.index_codec = (uint8_t)id;
            CHECK_CODE(shd_positions(&changed, 0, 1, positions, s.nnz, &first, NULL), SHD_UNKNOWN_INDEX_CODEC);
            CHECK_CODE(shd_find_blocks(&changed, 0, s.numel, &first, &last), SHD_UNKNOWN_INDEX_CODEC);
            unknown++;
        }
    }
    CHECK(unknown >= 2); /* 255 is never assigned */
    static const int never[] = {5, 9, 255};
    for (int i = 0; i < 3; i++) {
        shd_delta changed = delta;
        changed.tensor.op = (uint8_t)never[i];
        CHECK_CODE(shd_apply(&changed, &weights, 1, 0, delta.block_count, NULL, NULL), SHD_UNKNOWN_OP);
        changed = delta;
        changed.tensor.dtype = (uint8_t)never[i];
        weights.dtype = SHD_U64 + 100;
        CHECK_CODE(shd_apply(&changed, &weights, 1, 0, delta.block_count, NULL, NULL), SHD_WRONG_DTYPE);
        weights.dtype = SHD_BF16;
    }
    CHECK_CODE(shd_values_encode(SHD_VALUES_BITS, &value, 1, section, sizeof section), SHD_WRONG_OPERATION);
    CHECK_CODE(shd_values_encode(-1, &value, 1, section, sizeof section), SHD_WRONG_OPERATION);
    give(positions);
    give(memory);
    give_sample(&s);
}

void test_hostile(void) {
    bytes f = build_all_codecs();
    shd_file file;
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
    for (uint32_t i = 0; i < file.tensor_count; i++) {
        shd_delta delta;
        CHECK_CODE(shd_load(&file, i, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    }
    CHECK(use_file(f.data, f.size, SHD_CHECK_ALL));
    test_truncated(f);
    test_changed(f);
    test_changed_at_random(f);
    test_changed_after_loading();
    test_unknown_ids();
    give(f.data);
}
