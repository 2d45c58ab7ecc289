"""A receiver of slime's steps in front of vLLM, or of a folder: `python -m examples.serve_chain --help`."""
