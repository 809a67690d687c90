"""What a job can be asked to do, one file a stage."""
