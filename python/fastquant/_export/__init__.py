"""Quantized models as programs of torch.export that compilers know."""
