"""What safe-sched costs, and what it finds: measured."""
