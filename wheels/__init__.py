"""Wheels for every platform, built and checked on one machine: `python -m wheels OUT`, or `make wheels`.

libshd is plain C that the package loads with ctypes, so a wheel for a platform is the pure Python wheel and one shared
library.  Zig's C compiler, which is a Python package, makes the library for each platform.
"""
