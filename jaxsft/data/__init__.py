"""Labelled images: source -> order -> loader -> (device) augment."""
