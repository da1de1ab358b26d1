"""Tests of `toast plan`."""
