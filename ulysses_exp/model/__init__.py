"""A model under sequence parallelism: how it is built, its attention, its memory savers."""
