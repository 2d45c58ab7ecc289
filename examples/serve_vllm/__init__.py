"""Adapters that are switched between requests to vLLM's OpenAI-compatible server."""
