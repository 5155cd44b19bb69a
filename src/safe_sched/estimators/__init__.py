"""From what was measured of a row to a probability that it is harmful."""
