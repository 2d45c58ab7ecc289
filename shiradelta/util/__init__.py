"""Helpers for every other folder: atomic files, progress, interrupts."""
