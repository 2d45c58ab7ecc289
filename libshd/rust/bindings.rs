// Written by rust/bindings.py from include/shd.h, which documents all of it.

use core::ffi::{c_char, c_int, c_void};

pub const SHD_ABI: c_int = 1;
pub const SHD_NO_TENSOR: u32 = u32::MAX;

pub const SHD_OK: c_int = 0;
pub const SHD_BAD_MAGIC: c_int = 1;
pub const SHD_TRUNCATED: c_int = 2;
pub const SHD_UNSUPPORTED_VERSION: c_int = 3;
pub const SHD_HEADER_CHECKSUM: c_int = 4;
pub const SHD_UNKNOWN_FEATURE: c_int = 5;
pub const SHD_RESERVED_NOT_ZERO: c_int = 6;
pub const SHD_TRAILING_DATA: c_int = 7;
pub const SHD_LIMIT_EXCEEDED: c_int = 8;
pub const SHD_SECTION_LAYOUT: c_int = 9;
pub const SHD_SECTION_CHECKSUM: c_int = 10;
pub const SHD_PADDING_NOT_ZERO: c_int = 11;
pub const SHD_BAD_METADATA: c_int = 12;
pub const SHD_NAME_LAYOUT: c_int = 13;
pub const SHD_BAD_NAME: c_int = 14;
pub const SHD_DUPLICATE_NAME: c_int = 15;
pub const SHD_NAME_ORDER: c_int = 16;
pub const SHD_UNKNOWN_DTYPE: c_int = 17;
pub const SHD_UNKNOWN_OP: c_int = 18;
pub const SHD_UNKNOWN_INDEX_CODEC: c_int = 19;
pub const SHD_UNKNOWN_VALUE_CODEC: c_int = 20;
pub const SHD_BAD_SHAPE: c_int = 21;
pub const SHD_BAD_COUNT: c_int = 22;
pub const SHD_BAD_COMBINATION: c_int = 23;
pub const SHD_ZSTD_RATIO: c_int = 24;
pub const SHD_BAD_SIZE: c_int = 25;
pub const SHD_ZSTD_UNAVAILABLE: c_int = 26;
pub const SHD_BAD_ZSTD: c_int = 27;
pub const SHD_BAD_INDEX: c_int = 28;
pub const SHD_POSITION_ORDER: c_int = 29;
pub const SHD_POSITION_RANGE: c_int = 30;
pub const SHD_BAD_DIRECTORY: c_int = 31;
pub const SHD_BAD_VALUE: c_int = 32;
pub const SHD_DIGEST_MISMATCH: c_int = 33;
pub const SHD_BASE_NEEDED: c_int = 34;
pub const SHD_WRONG_BASE: c_int = 35;
pub const SHD_INVALID_ARGUMENT: c_int = 64;
pub const SHD_BUFFER_TOO_SMALL: c_int = 65;
pub const SHD_MISALIGNED: c_int = 66;
pub const SHD_WRONG_DTYPE: c_int = 67;
pub const SHD_WRONG_SHAPE: c_int = 68;
pub const SHD_WRONG_OPERATION: c_int = 69;
pub const SHD_BAD_STRENGTH: c_int = 70;
pub const SHD_READ_FAILED: c_int = 71;
pub const SHD_NOT_FOUND: c_int = 72;
pub const SHD_VALUES_DO_NOT_FIT: c_int = 73;
pub const SHD_OUT_OF_RANGE: c_int = 74;

pub const SHD_UNSPECIFIED: c_int = 0;
pub const SHD_F32: c_int = 1;
pub const SHD_F16: c_int = 2;
pub const SHD_BF16: c_int = 3;
pub const SHD_F64: c_int = 4;
pub const SHD_F8_E4M3: c_int = 5;
pub const SHD_F8_E5M2: c_int = 6;
pub const SHD_F8_E8M0: c_int = 7;
pub const SHD_BOOL: c_int = 8;
pub const SHD_U8: c_int = 9;
pub const SHD_I8: c_int = 10;
pub const SHD_U16: c_int = 11;
pub const SHD_I16: c_int = 12;
pub const SHD_U32: c_int = 13;
pub const SHD_I32: c_int = 14;
pub const SHD_U64: c_int = 15;
pub const SHD_I64: c_int = 16;
pub const SHD_F8_E4M3FNUZ: c_int = 17;
pub const SHD_F8_E5M2FNUZ: c_int = 18;
pub const SHD_C64: c_int = 19;

pub const SHD_OP_ADD: c_int = 0;
pub const SHD_OP_SET: c_int = 1;
pub const SHD_OP_ULP: c_int = 2;
pub const SHD_OP_NEW: c_int = 3;
pub const SHD_OP_DROP: c_int = 4;
pub const SHD_OP_REPLACE: c_int = 6;

pub const SHD_INDEX_NONE: c_int = 0;
pub const SHD_INDEX_RICE: c_int = 1;
pub const SHD_INDEX_RAW: c_int = 2;
pub const SHD_INDEX_BITMAP: c_int = 3;
pub const SHD_INDEX_STRUCT: c_int = 4;
pub const SHD_INDEX_ALL: c_int = 5;
pub const SHD_INDEX_TILED: c_int = 7;
pub const SHD_INDEX_SEEDED: c_int = 10;
pub const SHD_INDEX_FROM_BASE: c_int = 11;

pub const SHD_VALUES_NONE: c_int = 0;
pub const SHD_VALUES_F32: c_int = 1;
pub const SHD_VALUES_F16: c_int = 2;
pub const SHD_VALUES_BF16: c_int = 3;
pub const SHD_VALUES_I8: c_int = 4;
pub const SHD_VALUES_I4: c_int = 5;
pub const SHD_VALUES_SIGN: c_int = 6;
pub const SHD_VALUES_BITS: c_int = 7;
pub const SHD_VALUES_ULP: c_int = 8;
pub const SHD_VALUES_ULP_FROM_BASE: c_int = 10;

pub const SHD_HAS_BASE_FINGERPRINT: c_int = 1;
pub const SHD_HAS_RESULT_FINGERPRINT: c_int = 2;
pub const SHD_INDEX_ZSTD: c_int = 4;
pub const SHD_VALUES_ZSTD: c_int = 8;

pub const SHD_CHECK_SIZES: c_int = 0;
pub const SHD_CHECK_CRC: c_int = 1;
pub const SHD_CHECK_ALL: c_int = 2;
pub const SHD_SCALAR: c_int = 16;

pub const SHD_STRUCT_STATUS: c_int = 0;
pub const SHD_STRUCT_FILE: c_int = 1;
pub const SHD_STRUCT_TENSOR: c_int = 2;
pub const SHD_STRUCT_DELTA: c_int = 3;
pub const SHD_STRUCT_WEIGHTS: c_int = 4;
pub const SHD_STRUCT_RICE: c_int = 5;
pub const SHD_STRUCT_TILED: c_int = 6;
pub const SHD_STRUCT_FROM_BASE: c_int = 7;
pub const SHD_STRUCT_BASE_GRID: c_int = 8;

pub type shd_read_fn = Option<unsafe extern "C" fn(context: *mut c_void, offset: u64, buffer: *mut c_void, size: usize) -> c_int>;

pub type shd_zstd_fn = Option<unsafe extern "C" fn(context: *mut c_void, source: *const c_void, source_size: usize, result: *mut c_void, size: usize) -> c_int>;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_status {
    pub code: i32,
    pub tensor: u32,
    pub offset: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_file {
    pub data: *const u8,
    pub size: u64,
    pub front_size: u64,
    pub read: shd_read_fn,
    pub read_context: *mut c_void,
    pub zstd: shd_zstd_fn,
    pub zstd_context: *mut c_void,
    pub incompatible: u64,
    pub compatible: u64,
    pub names_offset: u64,
    pub names_size: u64,
    pub metadata_offset: u64,
    pub metadata_size: u64,
    pub tensor_count: u32,
    pub minor: u16,
    pub reserved: u16,
    pub digest: [u8; 32],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_section {
    pub offset: u64,
    pub stored: u64,
    pub decoded: u64,
    pub crc: u32,
    pub zstd: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_tensor {
    pub name: *const c_char,
    pub name_size: u32,
    pub number: u32,
    pub dims: [u64; 8],
    pub numel: u64,
    pub nnz: u64,
    pub base_fingerprint: u64,
    pub result_fingerprint: u64,
    pub index: shd_section,
    pub values: shd_section,
    pub rank: u8,
    pub dtype: u8,
    pub op: u8,
    pub index_codec: u8,
    pub value_codec: u8,
    pub flags: u8,
    pub reserved: [u8; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_delta {
    pub tensor: shd_tensor,
    pub block_count: u64,
    pub index: *const u8,
    pub values: *const u8,
    pub unary_bits: u64,
    pub low_offset: u64,
    pub unary_offset: u64,
    pub directory_offset: u32,
    pub k: u32,
    pub word: u32,
    pub scalar: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_from_base {
    pub next_position: u64,
    pub next_count: u64,
    pub nnz: u64,
    pub rank: u64,
    pub state: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_weights {
    pub data: *mut c_void,
    pub first_position: u64,
    pub count: u64,
    pub dtype: i32,
    pub any_dtype: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_rice {
    pub numel: u64,
    pub count: u64,
    pub unary_bits: u64,
    pub size: u64,
    pub k: u32,
    pub word: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_tiled {
    pub numel: u64,
    pub columns: u64,
    pub k: *const u8,
    pub row_classes: *const u8,
    pub column_classes: *const u8,
    pub tile_rows: u32,
    pub row_bits: u32,
    pub column_bits: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct shd_base_grid {
    pub numel: u64,
    pub columns: u64,
    pub thresholds: *const u16,
    pub groups: *const u8,
    pub row_classes: *const u8,
    pub column_classes: *const u8,
    pub classes: u32,
    pub tile_rows: u32,
    pub row_bits: u32,
    pub column_bits: u32,
}

unsafe extern "C" {
    pub fn shd_version() -> *const c_char;
    pub fn shd_abi() -> c_int;
    pub fn shd_error_name(code: c_int) -> *const c_char;
    pub fn shd_dtype_size(dtype: c_int) -> u32;
    pub fn shd_open(file: *mut shd_file, data: *const c_void, size: u64, status: *mut shd_status) -> c_int;
    pub fn shd_open_callback(file: *mut shd_file, read: shd_read_fn, context: *mut c_void, size: u64, front: *mut c_void, front_size: u64, status: *mut shd_status) -> c_int;
    pub fn shd_set_zstd(file: *mut shd_file, zstd: shd_zstd_fn, context: *mut c_void);
    pub fn shd_unpack_size(data: *const c_void, size: u64) -> u64;
    pub fn shd_unpack(data: *const c_void, size: u64, zstd: shd_zstd_fn, context: *mut c_void, result: *mut c_void, capacity: u64, unpacked: *mut u64, status: *mut shd_status) -> c_int;
    pub fn shd_metadata_next(file: *const shd_file, cursor: *mut u64, key: *mut *const c_char, key_size: *mut u32, value: *mut *const c_char, value_size: *mut u32) -> c_int;
    pub fn shd_tensor_at(file: *const shd_file, number: u32, tensor: *mut shd_tensor, status: *mut shd_status) -> c_int;
    pub fn shd_find(file: *const shd_file, name: *const c_char, name_size: usize, number: *mut u32) -> c_int;
    pub fn shd_scratch_size(file: *const shd_file, tensor: *const shd_tensor) -> u64;
    pub fn shd_decoded_size(tensor: *const shd_tensor) -> u64;
    pub fn shd_load(file: *const shd_file, number: u32, check: c_int, scratch: *mut c_void, scratch_size: u64, delta: *mut shd_delta, status: *mut shd_status) -> c_int;
    pub fn shd_check(file: *const shd_file, numbers: *const u32, count: u32, status: *mut shd_status) -> c_int;
    pub fn shd_verify(file: *const shd_file, scratch: *mut c_void, scratch_size: u64, status: *mut shd_status) -> c_int;
    pub fn shd_block_rank(delta: *const shd_delta, block: u64) -> u64;
    pub fn shd_find_blocks(delta: *const shd_delta, first_position: u64, end_position: u64, first_block: *mut u64, last_block: *mut u64) -> c_int;
    pub fn shd_positions(delta: *const shd_delta, first_block: u64, last_block: u64, positions: *mut i64, capacity: u64, count: *mut u64, status: *mut shd_status) -> c_int;
    pub fn shd_positions_between(delta: *const shd_delta, first_position: u64, end_position: u64, positions: *mut i64, capacity: u64, first_rank: *mut u64, count: *mut u64, status: *mut shd_status) -> c_int;
    pub fn shd_values(delta: *const shd_delta, first_rank: u64, count: u64, values: *mut f32, status: *mut shd_status) -> c_int;
    pub fn shd_elements(delta: *const shd_delta, first_rank: u64, count: u64, elements: *mut c_void, status: *mut shd_status) -> c_int;
    pub fn shd_from_base_scratch_size(section: *const c_void, size: u64) -> u64;
    pub fn shd_from_base_open(reader: *mut shd_from_base, section: *const c_void, size: u64, numel: u64, nnz: u64, scratch: *mut c_void, scratch_size: u64) -> c_int;
    pub fn shd_from_base_next(reader: *mut shd_from_base, elements: *const c_void, element_size: u32, positions: *mut i64, capacity: u64, count: *mut u64) -> c_int;
    pub fn shd_ulp_from_base_decode(section: *const c_void, size: u64, elements: *const c_void, element_size: u32, count: u64, shifts: *mut c_void) -> c_int;
    pub fn shd_apply(delta: *const shd_delta, weights: *const shd_weights, strength: f64, first_block: u64, last_block: u64, saved: *mut c_void, status: *mut shd_status) -> c_int;
    pub fn shd_sum_scratch_size(count: u32) -> u64;
    pub fn shd_apply_sum(deltas: *const *const shd_delta, strengths: *const f64, saved: *const *mut c_void, count: u32, weights: *const shd_weights, from_saved: c_int, scratch: *mut c_void, scratch_size: u64, status: *mut shd_status) -> c_int;
    pub fn shd_revert(delta: *const shd_delta, weights: *const shd_weights, first_block: u64, last_block: u64, saved: *const c_void, status: *mut shd_status) -> c_int;
    pub fn shd_fingerprint(delta: *const shd_delta, weights: *const shd_weights, first_block: u64, last_block: u64, fingerprint: *mut u64, status: *mut shd_status) -> c_int;
    pub fn shd_fingerprint_elements(positions: *const i64, first_position: u64, elements: *const c_void, count: u64, element_size: u32, fingerprint: *mut u64) -> c_int;
    pub fn shd_knows_index_codec(index_codec: c_int) -> c_int;
    pub fn shd_rice_plan(positions: *const i64, count: u64, numel: u64, plan: *mut shd_rice) -> c_int;
    pub fn shd_rice_encode(plan: *const shd_rice, positions: *const i64, section: *mut c_void, capacity: u64) -> c_int;
    pub fn shd_tiled_scratch_size(grid: *const shd_tiled) -> u64;
    pub fn shd_tiled_encode(grid: *const shd_tiled, positions: *const i64, count: u64, scratch: *mut c_void, scratch_size: u64, section: *mut c_void, capacity: u64, size: *mut u64) -> c_int;
    pub fn shd_from_base_plan_size(grid: *const shd_base_grid) -> u64;
    pub fn shd_from_base_plan(grid: *const shd_base_grid, elements: *const c_void, element_size: u32, positions: *const i64, count: u64, scratch: *mut c_void, scratch_size: u64, size: *mut u64) -> c_int;
    pub fn shd_from_base_encode(grid: *const shd_base_grid, elements: *const c_void, element_size: u32, positions: *const i64, count: u64, scratch: *mut c_void, section: *mut c_void, capacity: u64) -> c_int;
    pub fn shd_key_counts(elements: *const c_void, count: u64, element_size: u32, counts: *mut u64) -> c_int;
    pub fn shd_line_counts(grid: *const shd_base_grid, elements: *const c_void, element_size: u32, of_rows: *mut u64, of_columns: *mut u64) -> c_int;
    pub fn shd_joint_counts(grid: *const shd_base_grid, elements: *const c_void, element_size: u32, counts: *mut u64) -> c_int;
    pub fn shd_values_size(value_codec: c_int, dtype: c_int, count: u64) -> u64;
    pub fn shd_values_encode(value_codec: c_int, values: *const f32, count: u64, section: *mut c_void, capacity: u64) -> c_int;
    pub fn shd_count_at_least(x: *const f32, n: u64, threshold: f32) -> u64;
    pub fn shd_select_at_least(x: *const f32, n: u64, threshold: f32, first_position: u64, positions: *mut i64, capacity: u64, count: *mut u64) -> c_int;
    pub fn shd_crc32(crc: u32, data: *const c_void, size: usize) -> u32;
    pub fn shd_struct_size(which: c_int) -> usize;
    pub fn shd_simd() -> *const c_char;
}
