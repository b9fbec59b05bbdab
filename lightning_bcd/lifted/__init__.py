"""Lifted block coordinate descent: activations become variables, sub-problems are solved exactly."""
