"""From scores to a calibrated probability."""
