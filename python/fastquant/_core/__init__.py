"""Leaves: what every other room builds on, and that imports none of them."""
