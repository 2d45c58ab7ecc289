"""Backends that decode, encode and apply: their protocols, the NumPy reference, libshd."""
