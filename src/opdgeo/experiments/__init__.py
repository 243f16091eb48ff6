"""Presets, arms, controls and `reproduce`."""
