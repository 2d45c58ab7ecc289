"""An embedding service that holds one model and switches adapters between batches."""
