"""What safe-sched costs, measured."""
