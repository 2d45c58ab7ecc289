"""A real fine-tune to convert, small enough to keep here: its task, its training, its weights."""
