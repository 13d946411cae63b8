"""Whole published methods, built from :mod:`ranvier.nn` and :mod:`ranvier.ops`."""
