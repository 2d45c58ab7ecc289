"""A trainer that publishes its steps into a vLLM server while it answers."""
