/* The header, the sections of the whole file and the tensor table. */
#include "check.h"
#include "support.h"

#include <string.h>

/* One BF16 element set in each of three tensors by RAW and BITS. */
static bytes three_tensors(void) {
    static const uint8_t index[12] = {1}, values[12] = {0x80, 0x3F};
    static const char metadata[] = "\4\0\0\0\3\0\0\0basetom\7\0\0\0\0\0\0\0license";
    tensor_spec t[3];
    static const char *const names[3] = {"a.weight", "b.weight", "b.weight2"};
    for (int i = 0; i < 3; i++) {
        tensor_spec one = {.name = names[i], .rank = 1, .dims = {4}, .dtype = SHD_BF16, .op = SHD_OP_SET,
                           .index_codec = SHD_INDEX_RAW, .value_codec = SHD_VALUES_BITS, .nnz = 1,
                           .index = index, .index_size = 12, .values = values, .values_size = 12};
        t[i] = one;
    }
    return build_file(t, 3, 0, metadata, sizeof metadata - 1);
}

static void test_open_and_find(void) {
    bytes f = three_tensors();
    shd_file file;
    shd_status status;
    shd_tensor tensor;
    uint32_t number = 99;
    CHECK_CODE(shd_open(&file, f.data, f.size, &status), SHD_OK);
    CHECK(status.code == SHD_OK && status.tensor == SHD_NO_TENSOR);
    CHECK(file.tensor_count == 3);
    CHECK_CODE(shd_find(&file, "b.weight", 8, &number), SHD_OK);
    CHECK(number == 1);
    CHECK_CODE(shd_find(&file, "b.weight2", 9, &number), SHD_OK);
    CHECK(number == 2);
    CHECK_CODE(shd_find(&file, "b.weigh", 7, &number), SHD_NOT_FOUND);
    CHECK_CODE(shd_find(&file, "zzz", 3, &number), SHD_NOT_FOUND);
    CHECK_CODE(shd_tensor_at(&file, 1, &tensor, NULL), SHD_OK);
    CHECK(tensor.name_size == 8 && memcmp(tensor.name, "b.weight", 8) == 0);
    CHECK(tensor.numel == 4 && tensor.nnz == 1 && tensor.dtype == SHD_BF16 && tensor.rank == 1);
    CHECK(shd_decoded_size(&tensor) == 8 + 2);
    tensor.value_codec = SHD_VALUES_SIGN;
    tensor.nnz = UINT64_C(1) << 56;
    CHECK(shd_decoded_size(&tensor) == UINT64_C(12) << 56);
    CHECK_CODE(shd_tensor_at(&file, 3, &tensor, NULL), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_verify(&file, NULL, 0, &status), SHD_DIGEST_MISMATCH); /* the digest was left zero */
    give(f.data);
}

static void test_check(void) {
    static const uint32_t numbers[] = {2, 0, 1, 3};
    bytes f = three_tensors();
    shd_file file;
    shd_status status;
    shd_tensor tensor;
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
    CHECK_CODE(shd_check(&file, numbers, 3, &status), SHD_OK);
    CHECK(status.code == SHD_OK && status.tensor == SHD_NO_TENSOR);
    CHECK_CODE(shd_check(&file, numbers, 4, NULL), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_check(&file, NULL, 0, NULL), SHD_OK);
    CHECK_CODE(shd_check(NULL, numbers, 3, NULL), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_tensor_at(&file, 1, &tensor, NULL), SHD_OK);
    f.data[tensor.values.offset] ^= 1;
    CHECK_CODE(shd_check(&file, numbers, 2, NULL), SHD_OK);
    CHECK_CODE(shd_check(&file, numbers, 3, &status), SHD_SECTION_CHECKSUM);
    CHECK(status.tensor == 1 && status.offset == tensor.values.offset);
    give(f.data);
}

static void test_metadata(void) {
    bytes f = three_tensors();
    shd_file file;
    const char *key, *value;
    uint32_t key_size, value_size;
    uint64_t cursor = 0;
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
    CHECK_CODE(shd_metadata_next(&file, &cursor, &key, &key_size, &value, &value_size), SHD_OK);
    CHECK(key_size == 4 && memcmp(key, "base", 4) == 0 && value_size == 3 && memcmp(value, "tom", 3) == 0);
    CHECK_CODE(shd_metadata_next(&file, &cursor, &key, &key_size, &value, &value_size), SHD_OK);
    CHECK(key_size == 7 && value_size == 0);
    CHECK_CODE(shd_metadata_next(&file, &cursor, &key, &key_size, &value, &value_size), SHD_NOT_FOUND);
    give(f.data);
}

/* Changes one byte, makes the checksums right where asked for, and compares the refusal. */
static void check_refusal(uint64_t offset, uint8_t value, int fix, int expected) {
    bytes f = three_tensors();
    shd_file file;
    shd_status status;
    f.data[offset] = value;
    if (fix) {
        fix_checksums(f);
    }
    CHECK_CODE(shd_open(&file, f.data, f.size, &status), expected);
    CHECK(status.code == expected);
    give(f.data);
}

static void test_refusals(void) {
    const uint64_t record = 128 + 160, names = 128 + 512, metadata = names + 64;
    check_refusal(0, 0, 1, SHD_BAD_MAGIC);
    check_refusal(8, 2, 1, SHD_UNSUPPORTED_VERSION);
    check_refusal(10, 9, 1, SHD_OK); /* the minor decides nothing */
    check_refusal(24, 1, 1, SHD_OK); /* nor do compatible features */
    check_refusal(24, 1, 0, SHD_HEADER_CHECKSUM);
    check_refusal(16, 2, 1, SHD_UNKNOWN_FEATURE);
    check_refusal(112, 1, 1, SHD_RESERVED_NOT_ZERO);
    check_refusal(33, 0xFF, 1, SHD_TRUNCATED);
    check_refusal(32, 64, 1, SHD_TRAILING_DATA);
    check_refusal(43, 8, 1, SHD_LIMIT_EXCEEDED);
    check_refusal(57, 0xFF, 1, SHD_SECTION_LAYOUT);
    check_refusal(names, 'A', 0, SHD_SECTION_CHECKSUM);
    check_refusal(names + 63, 1, 1, SHD_PADDING_NOT_ZERO);
    check_refusal(metadata, 200, 1, SHD_BAD_METADATA);
    check_refusal(metadata + 8, 0xFF, 1, SHD_BAD_METADATA);
    check_refusal(metadata + 8, 'z', 1, SHD_BAD_METADATA); /* "zase" before "license" */
    check_refusal(record, 7, 1, SHD_NAME_LAYOUT);
    check_refusal(record + 4, 0, 1, SHD_BAD_NAME);
    check_refusal(names + 8, 0x1F, 1, SHD_BAD_NAME);
    check_refusal(names + 8, 0x80, 1, SHD_BAD_NAME);
    check_refusal(names + 8, 'a', 1, SHD_DUPLICATE_NAME);
    check_refusal(names + 8, '0', 1, SHD_NAME_ORDER);
    check_refusal(record + 12, 1, 1, SHD_RESERVED_NOT_ZERO);
    check_refusal(record + 11, 16, 1, SHD_RESERVED_NOT_ZERO);
    check_refusal(record + 7, 20, 1, SHD_UNKNOWN_DTYPE);
    check_refusal(record + 8, 5, 1, SHD_UNKNOWN_OP);
    check_refusal(record + 9, 6, 1, SHD_UNKNOWN_INDEX_CODEC);
    check_refusal(record + 10, 9, 1, SHD_UNKNOWN_VALUE_CODEC);
    check_refusal(record + 6, 9, 1, SHD_BAD_SHAPE);
    check_refusal(record + 104, 1, 1, SHD_BAD_SHAPE);
    check_refusal(record + 103, 2, 1, SHD_BAD_SHAPE);
    check_refusal(record + 16, 5, 1, SHD_BAD_COUNT);
    check_refusal(record + 10, 1, 1, SHD_BAD_COMBINATION);
    check_refusal(record + 11, 4, 1, SHD_BAD_COMBINATION); /* zstd without the feature bit */
    check_refusal(record + 24, 1, 1, SHD_RESERVED_NOT_ZERO);
    check_refusal(record + 40, 1, 1, SHD_SECTION_LAYOUT);
    check_refusal(record + 56, 1, 1, SHD_SECTION_LAYOUT);
    check_refusal(record + 16, 2, 1, SHD_BAD_SIZE);
}

/* ---- Through a callback ---- */

static int read_bytes(void *context, uint64_t offset, void *buffer, size_t size) {
    const bytes *f = context;
    if (offset > f->size || size > f->size - offset) {
        return 1;
    }
    memcpy(buffer, f->data + offset, size);
    return 0;
}

static void test_callback(void) {
    bytes f = three_tensors();
    static uint8_t front[4096], scratch[4096];
    shd_file file;
    shd_delta delta;
    int64_t position = -1;
    uint64_t count = 0;
    CHECK_CODE(shd_open_callback(&file, read_bytes, &f, f.size + 64, front, sizeof front, NULL), SHD_TRAILING_DATA);
    CHECK_CODE(shd_open_callback(&file, read_bytes, &f, f.size, front, 128, NULL), SHD_BUFFER_TOO_SMALL);
    CHECK(file.front_size > 128 && file.front_size <= sizeof front);
    CHECK_CODE(shd_open_callback(&file, read_bytes, &f, f.size, front, file.front_size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 2, SHD_CHECK_ALL, scratch, 64, &delta, NULL), SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_load(&file, 2, SHD_CHECK_ALL, scratch, sizeof scratch, &delta, NULL), SHD_OK);
    CHECK(shd_scratch_size(&file, &delta.tensor) == 128);
    CHECK_CODE(shd_positions(&delta, 0, delta.block_count, &position, 1, &count, NULL), SHD_OK);
    CHECK(count == 1 && position == 1);
    f.size -= 64; /* the last section cannot be read any more */
    CHECK_CODE(shd_load(&file, 2, SHD_CHECK_ALL, scratch, sizeof scratch, &delta, NULL), SHD_READ_FAILED);
    give(f.data);
}

/* ---- zstd, by a callback that only copies ---- */

static int copy_frame(void *context, const void *source, size_t source_size, void *result, size_t size) {
    (void)context;
    if (source_size != size) {
        return 1;
    }
    memcpy(result, source, size);
    return 0;
}

static void test_zstd(void) {
    static const uint8_t index[12] = {1}, values[12] = {0x80, 0x3F};
    tensor_spec t = {.name = "w", .rank = 1, .dims = {4}, .dtype = SHD_BF16, .op = SHD_OP_SET,
                     .index_codec = SHD_INDEX_RAW, .value_codec = SHD_VALUES_BITS, .nnz = 1,
                     .flags = SHD_INDEX_ZSTD, .index = index, .index_size = 12, .index_decoded = 12,
                     .values = values, .values_size = 12};
    bytes f = build_file(&t, 1, 1, NULL, 0);
    static uint8_t scratch[64];
    shd_file file;
    shd_delta delta;
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, scratch, 64, &delta, NULL), SHD_ZSTD_UNAVAILABLE);
    shd_set_zstd(&file, copy_frame, NULL);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, scratch, 64, &delta, NULL), SHD_OK);
    CHECK(delta.index == scratch);
    give(f.data);
    t.index_decoded = 12 * 65;
    f = build_file(&t, 1, 1, NULL, 0);
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_ZSTD_RATIO);
    give(f.data);
    t.index_size = 11; /* a frame that the callback refuses */
    t.index_decoded = 12;
    f = build_file(&t, 1, 1, NULL, 0);
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
    shd_set_zstd(&file, copy_frame, NULL);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, scratch, 64, &delta, NULL), SHD_BAD_ZSTD);
    give(f.data);
}

/* ---- Packed files ---- */

/* The packed file of one of a single tensor, nothing of whose sections is in CONTROL; its "frame" is CONTROL itself. */
static bytes pack(bytes f, uint64_t names_size) {
    const uint64_t rest = 8, control = 160 + names_size;
    const uint32_t sizes[3] = {(uint32_t)control, (uint32_t)control, 0};
    bytes packed = {take(128 + control + rest), 128 + control + rest};
    memcpy(packed.data, f.data, 128);
    memcpy(packed.data + 128, f.data + 128, 160);           /* one record: its columns are bytes */
    memcpy(packed.data + 288, f.data + 320, names_size);
    memset(packed.data + 128 + 40, 0, 8);                   /* leads */
    memset(packed.data + 128 + 64, 0, 8);
    memset(packed.data + 128 + 56, 0, 8);                   /* decoded sizes */
    memset(packed.data + 128 + 80, 0, 8);
    memset(packed.data + 128 + 88, 0, 8);                   /* CRCs */
    memcpy(packed.data + 128 + control, f.data + 384, 4);   /* INDEX without slack */
    memcpy(packed.data + 132 + control, f.data + 448, 4);   /* VALUES */
    packed.data[16] |= 4;
    memcpy(packed.data + 32, &packed.size, 8);
    memset(packed.data + 72, 0, 8);
    memcpy(packed.data + 112, sizes, sizeof sizes);
    return packed;
}

static void test_packed(void) {
    static const uint8_t index[12] = {1}, values[12] = {0x80, 0x3F};
    tensor_spec t = {.name = "w", .rank = 1, .dims = {4}, .dtype = SHD_BF16, .op = SHD_OP_SET,
                     .index_codec = SHD_INDEX_RAW, .value_codec = SHD_VALUES_BITS, .nnz = 1,
                     .index = index, .index_size = 12, .values = values, .values_size = 12};
    bytes f = build_file(&t, 1, 0, NULL, 0), packed = pack(f, 1);
    fix_packed_checksums(packed);
    uint64_t room = shd_unpack_size(packed.data, packed.size), unpacked = 0;
    uint8_t *result = take(room);
    shd_file file;
    shd_status status;
    CHECK(shd_unpack_size(f.data, f.size) == 0 && shd_unpack_size(packed.data, 127) == 0);
    CHECK(room >= f.size && room <= 195 * packed.size);
    CHECK_CODE(shd_open(&file, packed.data, packed.size, &status), SHD_UNKNOWN_FEATURE);
    CHECK(status.offset == 16);
    CHECK_CODE(shd_unpack(packed.data, packed.size, NULL, NULL, result, room, &unpacked, NULL), SHD_ZSTD_UNAVAILABLE);
    CHECK_CODE(shd_unpack(packed.data, packed.size, copy_frame, NULL, result, room - 1, &unpacked, NULL),
               SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_unpack(f.data, f.size, copy_frame, NULL, result, room, &unpacked, NULL), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_unpack(packed.data, packed.size, copy_frame, NULL, result, room, &unpacked, &status), SHD_OK);
    CHECK(status.code == SHD_OK && unpacked == f.size && memcmp(result, f.data, f.size) == 0);
    CHECK_CODE(shd_open(&file, result, unpacked, NULL), SHD_OK);
    packed.data[128 + 48] = 13; /* INDEX would take a byte of VALUES, and VALUES one that is not there */
    CHECK_CODE(shd_unpack(packed.data, packed.size, copy_frame, NULL, result, room, &unpacked, &status),
               SHD_SECTION_CHECKSUM);
    fix_packed_checksums(packed);
    CHECK_CODE(shd_unpack(packed.data, packed.size, copy_frame, NULL, result, room, &unpacked, &status),
               SHD_SECTION_LAYOUT);
    CHECK(status.offset == 128 && status.tensor == SHD_NO_TENSOR);
    give(result);
    give(packed.data);
    give(f.data);
}

static void test_crc(void) {
    static uint8_t data[1000];
    random_state r = {5};
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (uint8_t)random_bits(&r);
    }
    CHECK(shd_crc32(0, "123456789", 9) == 0xCBF43926u);
    CHECK(shd_crc32(0, NULL, 0) == 0);
    for (size_t size = 0; size < sizeof data; size++) { /* the long way, byte by byte, against whatever is fastest */
        uint32_t crc = 0;
        for (size_t i = 0; i < size; i++) {
            crc = shd_crc32(crc, data + i, 1);
        }
        CHECK(crc == shd_crc32(0, data, size));
    }
}

static void test_tables(void) {
    CHECK(strcmp(shd_version(), SHD_VERSION) == 0 && shd_abi() == SHD_ABI);
    CHECK(strcmp(shd_error_name(SHD_BAD_MAGIC), "bad_magic") == 0);
    CHECK(strcmp(shd_error_name(SHD_DIGEST_MISMATCH), "digest_mismatch") == 0);
    CHECK(strcmp(shd_error_name(SHD_VALUES_DO_NOT_FIT), "values_do_not_fit") == 0);
    CHECK(strcmp(shd_error_name(-1), "unknown_error") == 0 && strcmp(shd_error_name(50), "unknown_error") == 0);
    CHECK(shd_dtype_size(SHD_BF16) == 2 && shd_dtype_size(SHD_C64) == 8 && shd_dtype_size(20) == 0);
    CHECK(shd_struct_size(SHD_STRUCT_DELTA) == sizeof(shd_delta) && shd_struct_size(99) == 0);
}

void test_container(void) {
    test_tables();
    test_crc();
    test_open_and_find();
    test_check();
    test_metadata();
    test_refusals();
    test_callback();
    test_zstd();
    test_packed();
}
