"""The Redis that carries the tasks."""

# kombu 5.7 uses ZRANGE … BYSCORE, and BLMOVE is what waiting without polling needs: both came with 6.2.
LOWEST_VERSION = (6, 2)
