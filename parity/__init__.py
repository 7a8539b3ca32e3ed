"""Prove that an artifact computes what its source computes, and find where it doesn't."""
