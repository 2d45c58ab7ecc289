#include "support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#include <malloc.h>
#define aligned_alloc(alignment, size) _aligned_malloc(size, alignment)
#define free(memory) _aligned_free(memory)
#endif

void *take(size_t size) {
    size_t rounded = size == 0 ? 64 : (size + 63) & ~(size_t)63;
    void *memory = aligned_alloc(64, rounded);
    if (memory == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    return memset(memory, 0, rounded);
}

void give(void *memory) { free(memory); }

uint64_t random_bits(random_state *r) { /* splitmix64 */
    uint64_t z = r->state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

double random_unit(random_state *r) { return (double)(random_bits(r) >> 11) * 0x1p-53; }

uint64_t random_positions(random_state *r, uint64_t numel, double density, int64_t *positions, uint64_t capacity) {
    uint64_t count = 0;
    double position = -1;
    while (count < capacity) {
        double gap = density < 1 ? floor(log(1 - random_unit(r)) / log1p(-density)) : 0;
        position += 1 + gap;
        if (position >= (double)numel) {
            break;
        }
        positions[count++] = (int64_t)position;
    }
    return count;
}

void random_values(random_state *r, float *values, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) {
        double size = 0.001 + 0.004 * random_unit(r) * random_unit(r);
        values[i] = (float)(random_bits(r) & 1 ? size : -size);
    }
}

static uint64_t align64(uint64_t n) { return (n + 63) / 64 * 64; }
static void put(uint8_t *p, uint64_t v, size_t size) { memcpy(p, &v, size); }

static uint64_t get(const uint8_t *p, size_t size) {
    uint64_t v = 0;
    memcpy(&v, p, size);
    return v;
}

void fix_checksums(bytes file) {
    uint8_t *h = file.data;
    uint64_t sizes[4] = {160 * get(h + 12, 4), get(h + 40, 8), get(h + 48, 8), get(h + 56, 8)};
    uint64_t offset = 128;
    for (int i = 0; i < 4; i++) {
        if (offset <= file.size && sizes[i] <= file.size - offset) { /* the change may be to a size */
            put(h + 64 + 4 * i, shd_crc32(0, h + offset, sizes[i]), 4);
            offset = align64(offset + sizes[i]);
        }
    }
    put(h + 124, shd_crc32(0, h, 124), 4);
}

void fix_all_checksums(bytes f) {
    uint64_t tensors = get(f.data + 12, 4);
    for (uint64_t i = 0; i < 2 * tensors && 128 + 160 * (i / 2 + 1) <= f.size; i++) {
        uint8_t *record = f.data + 128 + 160 * (i / 2);
        uint64_t place[2];
        memcpy(place, record + (i % 2 ? 64 : 40), sizeof place);
        if (place[0] <= f.size && place[1] <= f.size - place[0]) {
            uint32_t crc = shd_crc32(0, f.data + place[0], place[1]);
            memcpy(record + (i % 2 ? 92 : 88), &crc, sizeof crc);
        }
    }
    fix_checksums(f);
}

void fix_packed_checksums(bytes file) {
    uint64_t rest = 128 + get(file.data + 112, 4);
    if (rest <= file.size) {
        put(file.data + 64, shd_crc32(0, file.data + 128, rest - 128), 4);
        put(file.data + 68, shd_crc32(0, file.data + rest, file.size - rest), 4);
    }
    put(file.data + 124, shd_crc32(0, file.data, 124), 4);
}

static void put_section(uint8_t *record, uint32_t at, uint32_t at_crc, bytes file, uint64_t offset, const void *data,
                        uint64_t size, uint64_t decoded) {
    put(record + at, offset, 8);
    put(record + at + 8, size, 8);
    put(record + at + 16, decoded != 0 ? decoded : size, 8);
    put(record + at_crc, shd_crc32(0, data, size), 4);
    if (size != 0) {
        memcpy(file.data + offset, data, size);
    }
}

static void put_tensor(bytes file, uint32_t number, const tensor_spec *t, uint64_t name_offset,
                       uint64_t names_offset, uint64_t *section_offset) {
    uint8_t *record = file.data + 128 + 160 * (uint64_t)number;
    uint64_t name_size = strlen(t->name);
    const uint8_t small[6] = {t->rank, t->dtype, t->op, t->index_codec, t->value_codec, t->flags};
    put(record, name_offset, 4);
    put(record + 4, name_size, 2);
    memcpy(record + 6, small, sizeof small);
    put(record + 16, t->nnz, 8);
    put(record + 24, t->base_fingerprint, 8);
    put(record + 32, t->result_fingerprint, 8);
    for (uint32_t i = 0; i < t->rank && i < 8; i++) {
        put(record + 96 + 8 * i, t->dims[i], 8);
    }
    memcpy(file.data + names_offset + name_offset, t->name, name_size);
    put_section(record, 40, 88, file, *section_offset, t->index, t->index_size, t->index_decoded);
    *section_offset += align64(t->index_size);
    put_section(record, 64, 92, file, *section_offset, t->values, t->values_size, t->values_decoded);
    *section_offset += align64(t->values_size);
}

bytes build_file(const tensor_spec *tensors, uint32_t count, uint64_t incompatible, const void *metadata,
                 uint64_t metadata_size) {
    static const uint8_t magic[8] = {0x89, 'S', 'H', 'D', '\r', '\n', 0x1A, '\n'};
    uint64_t names_size = 0, payload = 0;
    for (uint32_t i = 0; i < count; i++) {
        names_size += strlen(tensors[i].name);
        payload += align64(tensors[i].index_size) + align64(tensors[i].values_size);
    }
    uint64_t names_offset = 128 + align64(160 * (uint64_t)count);
    uint64_t metadata_offset = names_offset + align64(names_size);
    uint64_t section_offset = metadata_offset + align64(metadata_size);
    bytes file = {NULL, section_offset + payload};
    file.data = take(file.size);
    memcpy(file.data, magic, sizeof magic);
    put(file.data + 8, 1, 2);
    put(file.data + 12, count, 4);
    put(file.data + 16, incompatible, 8);
    put(file.data + 32, file.size, 8);
    put(file.data + 40, names_size, 8);
    put(file.data + 48, metadata_size, 8);
    if (metadata_size != 0) {
        memcpy(file.data + metadata_offset, metadata, metadata_size);
    }
    uint64_t name_offset = 0;
    for (uint32_t i = 0; i < count; i++) {
        put_tensor(file, i, &tensors[i], name_offset, names_offset, &section_offset);
        name_offset += strlen(tensors[i].name);
    }
    fix_checksums(file);
    return file;
}

static void must(int code) {
    if (code != SHD_OK) {
        fprintf(stderr, "making a test file: %s\n", shd_error_name(code));
        exit(2);
    }
}

bytes encode_positions(const int64_t *positions, uint64_t count, uint64_t numel) {
    shd_rice plan;
    must(shd_rice_plan(positions, count, numel, &plan));
    bytes section = {take(plan.size), plan.size};
    must(shd_rice_encode(&plan, positions, section.data, section.size));
    return section;
}

bytes encode_values(int value_codec, const float *values, uint64_t count) {
    bytes section = {NULL, shd_values_size(value_codec, SHD_F32, count)};
    section.data = take(section.size);
    must(shd_values_encode(value_codec, values, count, section.data, section.size));
    return section;
}

codec_list float_codecs(void) {
    static const float value = 1;
    uint8_t section[64];
    codec_list list = {0, {0}};
    for (int id = 0; id < 256; id++) {
        if (shd_values_encode(id, &value, 1, section, sizeof section) == SHD_OK) {
            list.ids[list.count++] = id;
        }
    }
    return list;
}

sample build_sample(uint64_t seed, uint64_t rows, uint64_t columns, double density, int value_codec, int dtype) {
    random_state r = {seed};
    sample s = {{NULL, 0}, rows * columns, 0, NULL, NULL};
    uint64_t capacity = (uint64_t)((double)s.numel * fmin(1, density * 1.2)) + 4096;
    s.positions = take(capacity * sizeof *s.positions);
    s.nnz = random_positions(&r, s.numel, density, s.positions, capacity);
    if (s.nnz == 0) {
        s.nnz = 1;
    }
    s.values = take(s.nnz * sizeof *s.values);
    random_values(&r, s.values, s.nnz);
    bytes index = encode_positions(s.positions, s.nnz, s.numel);
    bytes values = encode_values(value_codec, s.values, s.nnz);
    tensor_spec t = {.name = "weight",
                     .rank = 2,
                     .dims = {rows, columns},
                     .dtype = (uint8_t)dtype,
                     .op = SHD_OP_ADD,
                     .index_codec = SHD_INDEX_RICE,
                     .value_codec = (uint8_t)value_codec,
                     .nnz = s.nnz,
                     .index = index.data,
                     .index_size = index.size,
                     .values = values.data,
                     .values_size = values.size};
    s.file = build_file(&t, 1, 0, NULL, 0);
    give(index.data);
    give(values.data);
    return s;
}

void give_sample(sample *s) {
    give(s->file.data);
    give(s->positions);
    give(s->values);
}
