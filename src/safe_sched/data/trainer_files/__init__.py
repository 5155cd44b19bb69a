"""The data sets that a trainer's own configuration file names."""
