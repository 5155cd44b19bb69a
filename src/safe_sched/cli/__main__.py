"""``python -m safe_sched.cli``, for launchers: ``accelerate launch -m safe_sched.cli audit ...``."""

from safe_sched.cli import main

if __name__ == "__main__":
    main()
