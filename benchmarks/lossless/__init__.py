"""The next checkpoint of real training steps, side by side with other ways to send it."""
