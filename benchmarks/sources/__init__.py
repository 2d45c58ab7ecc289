"""What `convert` reads, by producer and kind: each source made at run time, and compared with its producer's merge.

python -m benchmarks.sources            all rows
python -m benchmarks.sources mlx npz    those of which the producer or the kind has one of the words
"""
