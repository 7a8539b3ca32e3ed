"""Capture a part once, lower it to files: one file a backend."""
