"""Images of a diffusers pipeline with a delta, and without it again."""
