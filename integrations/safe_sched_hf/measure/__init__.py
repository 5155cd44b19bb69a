"""What is measured of rows with a model, for training and for an audit."""
