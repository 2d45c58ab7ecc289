"""The fast backend: the C library libshd."""
