"""Torch as fastquant needs it: torch.ao, hooks, the compiler, private names."""
