"""Training in loops of others."""
