"""A run's adapter on the Hugging Face hub, with a model card that says how it was made."""

from aem_lightning.hub.card import card_facts, model_card
from aem_lightning.hub.push import Staged, push, stage

__all__ = ["Staged", "card_facts", "model_card", "push", "stage"]
