"""Weights & Biases: the run of a job, the server it goes to, and what was kept offline."""
