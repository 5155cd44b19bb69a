"""The small safety data set that ships with safe-sched (see README.md in this folder)."""
