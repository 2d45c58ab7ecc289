"""`.shd` files as a user meets them: opened, written, described."""
