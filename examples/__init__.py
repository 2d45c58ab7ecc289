"""Worked examples, each a folder of its own."""
