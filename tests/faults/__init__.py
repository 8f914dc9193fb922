"""Faults planted into real trainings: what is planted (plant) and how a training is run (drive)."""
