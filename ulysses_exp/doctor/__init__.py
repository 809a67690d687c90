"""Is this machine ready for a job? `python -m ulysses_exp.doctor`: one file a subject, each a list of findings."""
