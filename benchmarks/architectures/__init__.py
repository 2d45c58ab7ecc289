"""A matrix of architectures: what works on tiny random models, judged by other libraries than shiradelta.

`python -m benchmarks.architectures` prints it.  A cell is right, refused, or not applicable; a wrong result and a
traceback are neither, and the command exits with 1.
"""
