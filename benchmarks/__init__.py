"""Side-by-side measurements; `python -m benchmarks NAME` prints a table.  Nothing here is a test."""
