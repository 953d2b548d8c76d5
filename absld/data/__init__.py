"""Image sets, their augmented views, and the data sets they come from."""
