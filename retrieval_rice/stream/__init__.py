"""A stream as it comes: sources of frames, windows over them, and the time line of what they show."""
