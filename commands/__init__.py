"""The commands of the command line, a file each; those of a bench, of reports and of tuning lie with these."""
