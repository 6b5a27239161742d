"""Offline datasets: DSRL's HDF5 schema (dsrl.py)."""
