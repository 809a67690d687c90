"""A job and a sweep, in the parent process."""
