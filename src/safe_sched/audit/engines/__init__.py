"""Where shards of rows are scored: in this process, on all ranks, on a Ray cluster."""
