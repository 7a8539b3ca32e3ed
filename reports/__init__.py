"""Reports of records: verdicts, tables, one HTML page. Needs neither torch nor the hardware that was measured."""
