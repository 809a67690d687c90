"""What ranks count for each claim. Figures only: what they come to is decided in `claims/judgement.py`."""
