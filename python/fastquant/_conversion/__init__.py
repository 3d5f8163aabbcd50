"""From a prepared model to a quantized one."""
