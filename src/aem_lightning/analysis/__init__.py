"""The paper's analyses as commands: ``python -m aem_lightning.analysis <name> key=value ...``.

Each writes a figure (PNG), its numbers (JSON) and TensorBoard entries into one folder. Options are
in ``configs/analysis/<name>.yaml``. Source: arXiv 2605.00425.
"""
