"""Streams: sources of frames, windows over them, and the time line of products."""
