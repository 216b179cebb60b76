"""What a generation is: its stages, its events, and the use cases that move it. No I/O."""
