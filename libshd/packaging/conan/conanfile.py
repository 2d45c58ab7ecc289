"""The recipe of libshd for Conan 2: `conan create libshd/packaging/conan`."""

from pathlib import Path

from conan import ConanFile
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout
from conan.tools.files import copy, load


class Shd(ConanFile):
    """libshd, as a static or a shared library."""

    name = "shd"
    license = "Apache-2.0"
    url = homepage = "https://github.com/shiradelta/shiradelta"
    description = "Reads .shd files, sparse weight deltas, and patches weights with them, bit for bit"
    topics = ("lora", "sparse", "delta", "fine-tuning")
    package_type = "library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"shared": [True, False]}  # noqa: RUF012
    default_options = {"shared": False}  # noqa: RUF012

    def set_version(self):
        """That of shd.h."""
        header = load(self, Path(self.recipe_folder, "..", "..", "include", "shd.h"))
        self.version = header.partition('#define SHD_VERSION "')[2].partition('"')[0]

    def configure(self):
        """It is C."""
        self.settings.rm_safe("compiler.cppstd")
        self.settings.rm_safe("compiler.libcxx")

    def export_sources(self):
        """The folder that the recipe lies in, and the licence."""
        source = Path(self.recipe_folder, "..", "..")
        for pattern in ("CMakeLists.txt", "shd.pc.in", "src/*", "include/*"):
            copy(self, pattern, source, self.export_sources_folder)
        copy(self, "LICENSE", source.parent, self.export_sources_folder)

    def layout(self):
        """CMake's."""
        cmake_layout(self)

    def generate(self):
        """One kind of library, without tests."""
        toolchain = CMakeToolchain(self)
        shared = bool(self.options.shared)
        for name, value in (("SHARED", shared), ("STATIC", not shared), ("TESTS", False), ("INSTALL", True)):
            toolchain.cache_variables[f"SHD_{name}"] = value
        toolchain.generate()

    def build(self):
        """Compiles it."""
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        """Installs it."""
        copy(self, "LICENSE", self.source_folder, Path(self.package_folder, "licenses"))
        CMake(self).install()

    def package_info(self):
        """The target and the define of shdConfig.cmake."""
        self.cpp_info.libs = ["shd"]
        self.cpp_info.set_property("cmake_file_name", "shd")
        self.cpp_info.set_property("cmake_target_name", "shd::shd" if self.options.shared else "shd::static")
        self.cpp_info.set_property("pkg_config_name", "shd")
        if not self.options.shared:
            self.cpp_info.defines = ["SHD_STATIC"]
