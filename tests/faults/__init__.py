"""Faults in real trainings: plant causes them, drive runs a training, table reports results."""
