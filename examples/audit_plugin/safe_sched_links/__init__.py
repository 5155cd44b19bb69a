"""An example of a plug-in for ``safe-sched audit``."""
