"""Experiments: arms interleaved in processes of their own, on the same work, into one record."""
