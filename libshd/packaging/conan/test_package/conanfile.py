"""Links a program with the package, and runs it."""

import os

from conan import ConanFile
from conan.tools.build import can_run
from conan.tools.cmake import CMake, cmake_layout


class TestShd(ConanFile):
    """The test of the package."""

    settings = "os", "arch", "compiler", "build_type"
    generators = "CMakeDeps", "CMakeToolchain"

    def requirements(self):
        """What is tested."""
        self.requires(self.tested_reference_str)

    def layout(self):
        """CMake's."""
        cmake_layout(self)

    def build(self):
        """Compiles it."""
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def test(self):
        """Runs it."""
        if can_run(self):
            self.run(os.path.join(self.cpp.build.bindir, "test_package"), env="conanrun")
