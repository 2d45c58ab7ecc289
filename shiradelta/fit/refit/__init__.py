"""Values in closed form, from forward passes alone."""
