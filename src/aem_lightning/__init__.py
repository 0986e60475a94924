"""aem_lightning: multi-turn reinforcement learning of LLM agents on PyTorch Lightning, with AEM.

Nothing heavy is imported here: environment workers import this package and must start light.
"""

__version__ = "0.1.0"
