"""Reinforcement learning in two processes, synced by a chain."""
