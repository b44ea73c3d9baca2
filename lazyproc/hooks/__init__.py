"""The contract towards subclasses written for pyUSID: their hooks, and the loops that call them."""
