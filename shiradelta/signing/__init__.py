"""Signatures of `.shd` files: Ed25519, in a small text file beside them (spec/SIGNATURES.md)."""
