//! Compiles src/*.c into libshd.a, with the compiler that CC names and the archiver that AR names.
//! It needs no other crate, so it builds offline.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A tool for the target: `CC_<target>`, `TARGET_CC`, `CC`, or the default; it may have arguments.
fn tool(name: &str, default: &str) -> Vec<String> {
    let target = env::var("TARGET").unwrap();
    let names = [
        format!("{name}_{target}"),
        format!("{name}_{}", target.replace('-', "_")),
        format!("TARGET_{name}"),
        name.to_string(),
    ];
    for one in &names {
        println!("cargo:rerun-if-env-changed={one}");
    }
    let found = names.iter().find_map(|one| env::var(one).ok()).unwrap_or_else(|| default.to_string());
    found.split_whitespace().map(str::to_string).collect()
}

fn run(words: &[String], arguments: &[&Path]) {
    let status = Command::new(&words[0]).args(&words[1..]).args(arguments).status();
    match status {
        Ok(status) if status.success() => {}
        other => panic!("{} failed ({other:?}); set CC to a C11 compiler and AR to its archiver", words.join(" ")),
    }
}

fn main() {
    let msvc = env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("msvc");
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let mut sources: Vec<PathBuf> = std::fs::read_dir("src").unwrap().map(|entry| entry.unwrap().path()).collect();
    sources.retain(|path| path.extension().is_some_and(|end| end == "c"));
    sources.sort();
    let compiler = tool("CC", if msvc { "clang-cl" } else { "cc" });
    let mut objects = Vec::new();
    for source in &sources {
        let object = out.join(source.file_name().unwrap()).with_extension("o");
        let mut words = compiler.clone();
        // A product and a sum must never be contracted: the results are specified.
        let flags: &[&str] = if msvc {
            &["/std:c11", "/O2", "/fp:precise", "/DSHD_STATIC", "/Iinclude", "/c"]
        } else {
            &["-std=c11", "-O2", "-ffp-contract=off", "-fPIC", "-DSHD_STATIC", "-Iinclude", "-c"]
        };
        words.extend(flags.iter().map(|flag| flag.to_string()));
        words.extend(if msvc { [format!("/Fo{}", object.display())].to_vec() } else { ["-o".to_string(), object.display().to_string()].to_vec() });
        run(&words, &[source]);
        objects.push(object);
    }
    let library = out.join(if msvc { "shd.lib" } else { "libshd.a" });
    let _ = std::fs::remove_file(&library);
    let mut archiver = tool("AR", if msvc { "llvm-lib" } else { "ar" });
    archiver.push(if msvc { format!("/out:{}", library.display()) } else { "crs".to_string() });
    let mut files: Vec<&Path> = if msvc { vec![] } else { vec![&library] };
    files.extend(objects.iter().map(PathBuf::as_path));
    run(&archiver, &files);
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static=shd");
    println!("cargo:include={}", env::current_dir().unwrap().join("include").display());
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=include");
}
