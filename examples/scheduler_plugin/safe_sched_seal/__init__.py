"""An example of a plug-in: a scheduler with a measurement of its own."""
