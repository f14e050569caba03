"""Budgets instead of layer counts: bytes, seconds, memory and losses of cuts, and who meets them.

`size` counts bytes, `speed` times the parts of a model, `loss` searches by held-out losses,
`decide` takes the number of layers that meets what was wished, `instead` asks what quantising does.
"""
