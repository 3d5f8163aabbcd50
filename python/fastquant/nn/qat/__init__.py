"""Modules that train with quantization in mind."""
