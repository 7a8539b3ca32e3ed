"""One file a pipeline family."""
