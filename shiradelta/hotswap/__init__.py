"""Switching deltas on a live model: the session, and one backend for each kind of memory."""
