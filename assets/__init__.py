"""Weights, small data sets and figures that ship with the library."""
