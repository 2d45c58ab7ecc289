"""The method "refit": values in closed form, from forward passes alone."""
