"""The first hour on a GPU as one command: ``python -m aem_lightning.gpu_check``.

Seven checks, the cheapest to tell of a fault first, each a file of figures that is not made again.
Policies have random weights of a real shape: their responses run to the last token that is allowed
and their episodes to the last turn, which is the worst case, and the same every time.
"""
