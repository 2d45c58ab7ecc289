//! Bindings to libshd, which reads `.shd` files (sparse weight deltas) and patches weights with them, bit for bit.
//!
//! The functions are those of `include/shd.h`, where all of them are documented. The library is compiled with the
//! crate; it allocates nothing and needs nothing but `memcpy` and its like.
#![no_std]
#![allow(non_camel_case_types)]

include!("bindings.rs");
