"""One training run: its loop, session, gate, checkpoints, ranks and manifest."""
