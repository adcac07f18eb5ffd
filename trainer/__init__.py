"""Fitting, evaluation and the gate that a new model must pass."""
