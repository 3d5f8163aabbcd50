"""Packages of modules, as in torch.ao.nn."""
