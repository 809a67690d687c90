"""Files that somebody else may have made, read as data."""
