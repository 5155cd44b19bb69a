"""Who a row is: its key, its slot among the distinct rows of a training set, and its loss."""
