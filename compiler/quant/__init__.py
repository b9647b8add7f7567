"""How each linear of a model is quantized: by the user's wish, or as its checkpoint already is.

In come a request and a checkpoint's config and tensors; out comes, for every linear, a `QuantTensor` that is read tile
by tile, or the reason why it stays float. `config` holds what may be asked for and how values of a config are checked,
`instant` our own formulas, `readers` the way to the formats of others, which `stored` says what they have in common; a
new format is a module like `awq` and a line in `readers`. Codes are never decoded to floats here.
"""
