"""A family of experts against one delta, on several tasks at once."""
