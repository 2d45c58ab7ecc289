"""Requests for many adapters: switching fused weights between groups, against multi-LoRA on mixed batches."""
