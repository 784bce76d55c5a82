"""What operators are shown of the whole service. One file a capability: what it takes, and the series it makes of it.

`keep` has one process at a time take them, and every process show them. `every` lists them.
"""
