"""Publishes `.shd` files on the Hugging Face Hub: the upload, and the model card that says what a file is."""
