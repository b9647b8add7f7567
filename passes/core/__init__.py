"""What every pass stands on, and no pass: the contract and how passes are run (`rewrite`, `tidy`), lazy constants
(`lazy`), the normal form of a linear (`linear`), the arithmetic of quantization (`quant`, `search`), what must hold of
a graph (`verify`), its text (`dump`), its evaluation on a CPU (`evaluate`) and the errors of users. Imports no other
subfolder.
"""
