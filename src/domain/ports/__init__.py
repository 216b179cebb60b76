"""What the domain needs of the world: one module per port, with the records that pass through it.

Every adapter of a port passes the port's contract suite in ``tests/contracts``.
"""
