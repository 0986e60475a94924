"""Rollouts: prompts and their encoding, engines and their protocol, the collector, packing."""

from aem_lightning.rollout.actions import action_mask
from aem_lightning.rollout.anchors import anchor_states, hidden_states
from aem_lightning.rollout.chat import ChatResponder, TextEncoder
from aem_lightning.rollout.collector import (
    Collector,
    EngineResponder,
    EnvironmentPool,
    Episode,
    EpisodesOver,
    Live,
    Responder,
    make_groups,
    stable_seed,
)
from aem_lightning.rollout.encoder import PromptEncoder
from aem_lightning.rollout.endpoint import (
    ContextFullError,
    Endpoint,
    EndpointError,
    RequestError,
    StoppedError,
)
from aem_lightning.rollout.engine import Request, Result, RolloutEngine, Sampling
from aem_lightning.rollout.expert import Expert, ExpertResponder
from aem_lightning.rollout.finite import NotFiniteError, place_of
from aem_lightning.rollout.packing import micro_batches, minibatches, pack
from aem_lightning.rollout.prompt import Prompt
from aem_lightning.rollout.rewards import RewardShaping
from aem_lightning.rollout.slot_engine import SlotEngine
from aem_lightning.rollout.vllm_engine import VllmEngine
from aem_lightning.rollout.vllm_server import VllmError

__all__ = [
    "ChatResponder",
    "Collector",
    "ContextFullError",
    "Endpoint",
    "EndpointError",
    "EngineResponder",
    "EnvironmentPool",
    "Episode",
    "EpisodesOver",
    "Expert",
    "ExpertResponder",
    "Live",
    "NotFiniteError",
    "Prompt",
    "PromptEncoder",
    "Request",
    "RequestError",
    "Responder",
    "Result",
    "RewardShaping",
    "RolloutEngine",
    "Sampling",
    "SlotEngine",
    "StoppedError",
    "TextEncoder",
    "VllmEngine",
    "VllmError",
    "action_mask",
    "anchor_states",
    "hidden_states",
    "make_groups",
    "micro_batches",
    "minibatches",
    "pack",
    "place_of",
    "stable_seed",
]
