"""Proof that training and inference here compute what PyTorch computes: torch is the oracle, every quantity a row.

`table` holds rows and tolerances, `oracle` the torch side, `ours` the JAX side, `compare` walks through both, and
`python -m jaxsft.parity` prints the result.
"""
