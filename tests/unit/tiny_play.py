"""Small pieces that tests play with: tokenizers, a policy, environments in this very process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from coin import ACTIONS, CoinEnv
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from aem_lightning.modules import Architecture, Lora, Policy, build_tiny_model, build_tokenizer
from aem_lightning.rollout import Live, Prompt, PromptEncoder, Result
from aem_lightning.types import EnvStep, ResetRequest, Task

WORDS = (
    *ACTIONS,
    "A coin glints near the box . You find the coin !",
    "The box is empty . Nothing happens . find the coin",
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = Prompt(
    opening="{observation}",
    turn="{observation}",
    window="{history} {observation}",
    history_item="{observation} {action}",
    action="plain",
)
TAGGED = Prompt(
    opening="{goal} {observation}",
    turn="{observation}",
    window="{goal} {history} {observation}",
    demonstration="<think></think><action>{action}</action>",
)
SMALL = Architecture(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny policy's own kind."""
    return build_tokenizer(WORDS)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Qwen2.5's kind: bytes with merges, its chat template, a line break after a closed turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    return fast


def make_policy(
    tokenizer: PreTrainedTokenizerFast | None = None, *, lora: bool = True, awake: bool = False
) -> Policy:
    """A random policy; with ``awake`` its adapters are not the identity that they start as."""
    tokenizer = tokenizer or word_tokenizer()
    adapters = Lora(r=2, alpha=4) if lora else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # PEFT draws its first weights from the global stream
        policy = Policy(build_tiny_model(tokenizer, SMALL, seed=0), tokenizer, adapters)
    if awake:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                if "lora_B" in name:
                    parameter.normal_(std=0.3, generator=generator)
    return policy


def coin_task(number: int, split: str = "train") -> Task:
    return Task(f"{split}/{number}", "coin", split)


class LocalPool:
    """What a collector asks of a pool, without processes; ``sent`` keeps every action."""

    def __init__(self, make_env: Callable[[], Any] = CoinEnv) -> None:
        self.make_env = make_env
        self.envs: dict[str, Any] = {}
        self.requests: dict[str, ResetRequest] = {}
        self.sent: dict[str, list[str]] = {}
        self.most_at_once = 0
        self.answers: dict[str, EnvStep] = {}

    def send(
        self,
        requests: Mapping[str, ResetRequest] | None = None,
        actions: Mapping[str, str] | None = None,
    ) -> None:
        self.answers = self.reset(requests or {}) | self.step(actions or {})

    def receive(self) -> dict[str, EnvStep]:
        answers, self.answers = self.answers, {}
        return answers

    def reset(self, requests: Mapping[str, ResetRequest]) -> dict[str, EnvStep]:
        steps = {}
        for key, request in requests.items():
            self.requests[key], self.sent[key] = request, []
            self.envs[key] = self.make_env()
            observation, info = self.envs[key].reset(
                seed=request.seed, options={"task_id": request.task_id}
            )
            steps[key] = EnvStep(observation, info=info)
        self.most_at_once = max(self.most_at_once, len(self.envs))
        return steps

    def step(self, actions: Mapping[str, str]) -> dict[str, EnvStep]:
        for key, action in actions.items():
            self.sent[key].append(action)
        return {key: EnvStep(*self.envs[key].step(action)) for key, action in actions.items()}

    def release(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.envs.pop(key)


class Script:
    """A responder that says ``lines`` in turn, the last one for ever.

    With ``cut`` its responses end by their length, without an end token.
    """

    def __init__(self, encoder: PromptEncoder, *lines: str, cut: bool = False) -> None:
        self.encoder, self.lines, self.cut = encoder, lines, cut
        self.over: list[str] = []
        self.thought: list[Result] = []

    def ask(self, live: Mapping[str, Live]) -> None:
        self.thought += [self.answer(key, len(item.trajectory.turns)) for key, item in live.items()]

    def answers(self) -> list[Result]:
        thought, self.thought = self.thought, []
        return thought

    def answer(self, key: str, turn: int) -> Result:
        text = self.lines[min(turn, len(self.lines) - 1)]
        tokens = list(self.encoder.tokenizer(text, add_special_tokens=False).input_ids)
        if not self.cut:
            tokens += self.encoder.stop_ids
        count = len(tokens)
        reason = "length" if self.cut else "stop"
        return Result(key, tokens, [-0.5] * count, [0.25] * count, reason, 1, 0)

    def forget(self, keys: Iterable[str]) -> None:
        self.over += keys


def ids_of(text: str, encoder: PromptEncoder) -> list[int]:
    return list(encoder.tokenizer(text, add_special_tokens=False).input_ids)


def conversation(encoder: PromptEncoder, messages: Sequence[str], reply: bool) -> str:
    """The chat template's own rendering of alternating user and assistant messages."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    if encoder.prompt.system:
        turns.insert(0, {"role": "system", "content": encoder.prompt.system})
    rendered = encoder.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=reply
    )
    return str(rendered)
