"""What every other folder may use: atomic files, progress, interrupts."""
