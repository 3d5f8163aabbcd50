"""All that depends on torch's internals: torch.ao, hooks, the compiler, private names."""
