"""Figures of a trained run, one module for each kind of target."""
