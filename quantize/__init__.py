"""Low-bit weights: a format a file. Exporters write what a format packs, each in its backend's own encoding."""
