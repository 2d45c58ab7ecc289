"""Opens, writes and describes `.shd` files."""
