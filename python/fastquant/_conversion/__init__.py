"""From a prepared model to a quantized one.

`plan` decides what is swapped; `checks` refuses and warns; `swapping` makes and places the new
modules; `quick` is a short cut through copying and through torch's `from_float`; `weights`
quantizes.
"""
