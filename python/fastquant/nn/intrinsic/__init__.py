"""Fused modules."""
