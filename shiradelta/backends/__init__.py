"""Who decodes, encodes and applies: the seam, the NumPy reference, libshd."""
