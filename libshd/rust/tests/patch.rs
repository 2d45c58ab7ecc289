//! The bindings are those of the library that was compiled: sizes of structs, the ABI, and a patch with its way back.
//! SHD_TEST_FILE may name a .shd file with a tensor `w` of float32 weights.

use shd_sys::*;
use std::ffi::CStr;
use std::mem::{size_of, zeroed};
use std::ptr::null_mut;

#[test]
fn structs_have_the_sizes_of_the_library() {
    let sizes = [
        (SHD_STRUCT_STATUS, size_of::<shd_status>()),
        (SHD_STRUCT_FILE, size_of::<shd_file>()),
        (SHD_STRUCT_TENSOR, size_of::<shd_tensor>()),
        (SHD_STRUCT_DELTA, size_of::<shd_delta>()),
        (SHD_STRUCT_WEIGHTS, size_of::<shd_weights>()),
        (SHD_STRUCT_RICE, size_of::<shd_rice>()),
        (SHD_STRUCT_TILED, size_of::<shd_tiled>()),
        (SHD_STRUCT_FROM_BASE, size_of::<shd_from_base>()),
        (SHD_STRUCT_BASE_GRID, size_of::<shd_base_grid>()),
    ];
    for (which, size) in sizes {
        assert_eq!(unsafe { shd_struct_size(which) }, size, "struct {which}");
    }
    assert_eq!(unsafe { shd_abi() }, SHD_ABI);
}

#[test]
fn the_crate_has_the_version_of_the_library() {
    let version = unsafe { CStr::from_ptr(shd_version()) };
    assert_eq!(version.to_str().unwrap(), env!("CARGO_PKG_VERSION"));
}

#[test]
fn what_is_no_file_is_refused_by_name() {
    let bytes = [0u8; 256];
    let mut file: shd_file = unsafe { zeroed() };
    let code = unsafe { shd_open(&mut file, bytes.as_ptr().cast(), 256, null_mut()) };
    assert_eq!(code, SHD_BAD_MAGIC);
    assert_eq!(unsafe { CStr::from_ptr(shd_error_name(code)) }.to_str().unwrap(), "bad_magic");
}

#[test]
fn a_patch_is_taken_back() {
    let Ok(path) = std::env::var("SHD_TEST_FILE") else { return };
    let bytes = std::fs::read(path).unwrap();
    unsafe {
        let (mut file, mut delta, mut number): (shd_file, shd_delta, u32) = (zeroed(), zeroed(), 0);
        assert_eq!(shd_open(&mut file, bytes.as_ptr().cast(), bytes.len() as u64, null_mut()), SHD_OK);
        assert_eq!(shd_find(&file, c"w".as_ptr(), 1, &mut number), SHD_OK);
        assert_eq!(shd_load(&file, number, SHD_CHECK_ALL, null_mut(), 0, &mut delta, null_mut()), SHD_OK);
        let base: Vec<f32> = (0..delta.tensor.numel).map(|i| i as f32).collect();
        let (mut now, mut saved) = (base.clone(), vec![0f32; delta.tensor.nnz as usize]);
        let weights = shd_weights {
            data: now.as_mut_ptr().cast(),
            first_position: 0,
            count: delta.tensor.numel,
            dtype: SHD_F32,
            any_dtype: 0,
        };
        let blocks = delta.block_count;
        assert_eq!(shd_apply(&delta, &weights, 0.5, 0, blocks, saved.as_mut_ptr().cast(), null_mut()), SHD_OK);
        let changed = now.iter().zip(&base).filter(|(a, b)| a != b).count();
        assert_eq!(changed as u64, delta.tensor.nnz);
        assert_eq!(shd_revert(&delta, &weights, 0, blocks, saved.as_ptr().cast(), null_mut()), SHD_OK);
        assert_eq!(now, base);
    }
}
