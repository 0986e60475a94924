"""TRL's GRPOTrainer with an environment on the word game: its own rollout, its own update.

A random model calls no tool, so every response counts as a call of the environment's only tool
until the environment says that it is done. Everything else is TRL's own code.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from word_world import DONE, WordGame

TEMPLATE = (
    "{% for message in messages %}<|{{ 'user' if message.role == 'tool' else message.role }}|>"
    "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments }}{% endfor %}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class TrlTimes:
    """What one iteration of TRL took: seconds of rollout and of all, and sampled tokens."""

    rollout: float
    step: float
    tokens: int


def trl_version() -> str | None:
    """The installed TRL's version; ``None`` where it is not installed."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None


class ToolGame:
    """`WordGame` as TRL wants it: a method for a tool, a reward at the end."""

    make: Any = None

    def reset(self, **row: Any) -> str:
        self.game: WordGame = type(self).make()
        self.won = 0.0
        return self.game.reset(options={"task_id": row["task"]})[0]

    def act(self, words: str) -> str:
        """Act.

        Args:
            words: What to do.

        Returns:
            What the game says.
        """
        text, self.won, *_ = self.game.step(words)
        return text

    def get_reward(self) -> float:
        return self.won


def _as_call(tokenizer: Any, ids: Any, prefix: Any = None, tools: Any = None) -> dict[str, Any]:
    """Any response as a tool call, until the game is over."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    if tokenizer.convert_tokens_to_ids(DONE) not in prefix:
        words = tokenizer.decode(ids)
        function = {"name": "act", "arguments": {"words": words}}
        message["tool_calls"] = [{"type": "function", "function": function}]
    return message


def run_trl(
    model: Any, tokenizer: Any, make_game: Any, settings: dict[str, Any], stops: list[int]
) -> TrlTimes:
    """One warm-up iteration of one task, then one that is timed.

    Args:
        model: A causal LM; it is copied.
        tokenizer: Its tokenizer; it is copied.
        make_game: Makes a `WordGame`.
        settings: ``tasks``, ``group_size``, ``turns``, ``max_new_tokens``, ``lr``, ``lora_r``,
            ``kl``.
        stops: Ids that end a response.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = "all"  # not used: the parser is replaced
    model.generation_config.eos_token_id = stops
    grpo_trainer.parse_response = _as_call
    game = type("Game", (ToolGame,), {"make": staticmethod(make_game)})
    count = settings["tasks"] * settings["group_size"]
    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *args: Any, **options: Any) -> None:
            marks.append(time.perf_counter())

    prompt = [{"role": "user", "content": ""}]
    rows = [{"prompt": prompt, "task": f"train/{i}"} for i in range(2 * settings["tasks"])]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=count,
            num_generations=settings["group_size"],
            max_completion_length=settings["turns"] * (settings["max_new_tokens"] + 90),
            generation_kwargs={
                "max_new_tokens": settings["max_new_tokens"],
                "eos_token_id": stops,
            },
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=settings["kl"],
            learning_rate=settings["lr"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=model.device.type != "cuda",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            shuffle_dataset=False,
            dataloader_num_workers=0,
        )
        trainer = GRPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=settings["lora_r"],
                lora_alpha=2 * settings["lora_r"],
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            environment_factory=game,
            callbacks=[Marks()],
        )
        # Not all stop ids are the tokenizer's: TRL cuts a response at these.
        trainer.eos_token_ids = stops
        played: list[tuple[float, int]] = []
        generate = trainer._generate

        def timed(prompts: Any) -> Any:
            start = time.perf_counter()
            output = generate(prompts)
            played.append((time.perf_counter() - start, sum(map(sum, output[2]))))
            return output

        trainer._generate = timed
        trainer.train()
    seconds, tokens = played[-1]
    return TrlTimes(seconds, marks[-1] - marks[-2], tokens)
