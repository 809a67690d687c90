"""What a layout needs and takes, without running it."""
