"""Chat templates of real models, made anew and small, and what an encoder makes of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aem_lightning.rollout import Prompt, PromptEncoder
from aem_lightning.rollout.encoder import Memory, Thoughts
from aem_lightning.types import EnvStep, Task, Trajectory, Turn

FOLDER = Path(__file__).parents[1] / "templates"
PROMPT = Prompt(
    opening="{observation}",
    turn="{observation}",
    window="{history} {observation}",
    require_thinking=True,
    demonstration="<think></think><action>{action}</action>",
    system="Find the coin.",
)
CONTROL = [
    "<s>",
    "</s>",
    "<eos>",
    "<bos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_sep|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_text|>",
    "[INST]",
    "[/INST]",
    "<|im_system|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_middle|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|end|>",
    "<|return|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|turn>",
    "<turn|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "[gMASK]",
    "<sop>",
    "<|system_start|>",
    "<|system_end|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<think>",
    "</think>",
]


@dataclass(frozen=True)
class Fact:
    """What is to come of a template.

    Attributes:
        eos: The tokenizer's end of sequence.
        end: The token that closes a reply.
        opens: The template opens the reasoning in the prompt.
        same: A transcript without thoughts is, token by token, what the template writes of it.
    """

    eos: str
    end: str
    opens: bool = False
    same: bool = True


_IM = Fact("<|im_end|>", "<|im_end|>")
_S = Fact("</s>", "</s>")
_EOT = Fact("<|eot_id|>", "<|eot_id|>")
FACTS = {
    **dict.fromkeys(("qwen2_5", "qwen3_coder", "qwen3", "smollm2", "smollm3", "chatml"), _IM),
    **dict.fromkeys(("yi", "internlm2", "lfm2", "minicpm4", "kimi_k2", "phi4"), _IM),
    **dict.fromkeys(("qwq", "qwen3_5"), Fact("<|im_end|>", "<|im_end|>", opens=True, same=False)),
    **dict.fromkeys(("llama3_1", "llama3_2"), _EOT),
    # A blank before each reply, which the prompt that asks for it has not.
    **dict.fromkeys(("llama2", "mistral_v1", "mistral_v3", "mixtral"), replace(_S, same=False)),
    "mistral_tekken": _S,
    **dict.fromkeys(("granite3_3", "granite4"), Fact("<|end_of_text|>", "<|end_of_text|>")),
    "deepseek_v3": Fact("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek_r1_distill": Fact("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", True, False),
    "gpt_oss": Fact("<|return|>", "<|return|>", same=False),
    **dict.fromkeys(("gemma2", "gemma3"), Fact("<eos>", "<end_of_turn>")),
    "gemma4": Fact("<eos>", "<turn|>"),
    "phi3_5": Fact("<|endoftext|>", "<|end|>"),
    "glm4_6": Fact("<|endoftext|>", "<|user|>", same=False),
    "apertus": Fact("</s>", "<|assistant_end|>"),
    "command_r": Fact("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    **dict.fromkeys(("olmo2", "falcon3"), Fact("<|endoftext|>", "<|endoftext|>")),
    "zephyr": _S,
    "seed_oss": Fact("<eos>", "<eos>"),
}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes and control tokens, with the template ``name``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken(t, special="think" not in t, normalized=False) for t in CONTROL])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=FACTS[name].eos, bos_token="<s>")
    made.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return made


def encoder(
    name: str, memory: Memory = "transcript", thoughts: Thoughts = "keep", system: bool = True
) -> PromptEncoder:
    """An encoder with the template ``name``."""
    prompt = PROMPT if system else Prompt(PROMPT.opening, PROMPT.turn, PROMPT.window)
    return PromptEncoder(tokenizer(name), prompt, memory, thoughts=thoughts)


def play(encoder: PromptEncoder, reply: str, ended: str | None) -> Iterator[tuple[list[int], str]]:
    """Three prompts, as ids and as text; each is answered by ``reply`` and the token ``ended``."""
    trajectory = Trajectory(Task("t"), 0, 0)
    for number, seen in enumerate(("a white box", "an empty room", "a red box")):
        step = EnvStep(seen)
        prompt = encoder.next(step, trajectory) if number else encoder.first(step)
        yield prompt, str(encoder.tokenizer.decode(prompt))
        said = list(encoder.tokenizer(reply, add_special_tokens=False).input_ids)
        if ended is not None:
            said.append(int(encoder.tokenizer.convert_tokens_to_ids(ended)))
        trajectory.rows.append(prompt + said)
        text = encoder.decode(said)
        action = encoder.prompt.parse(text)
        reason = "length" if ended is None else "stop"
        trajectory.turns.append(
            Turn(seen, (), text, action, number, len(prompt), [-1.0] * len(said), None, reason)
        )


def whole(encoder: PromptEncoder, reply: str) -> str:
    """What the template itself writes of a game of three prompts."""
    messages = ["a white box", reply, "an empty room", reply, "a red box"]
    return encoder._render(messages)


def page() -> str:
    """The table of templates for docs/models.md."""
    lines = [
        "## Chat templates",
        "",
        "What is known of each template, made anew as a small one (`tests/templates`) and not held "
        "against the genuine file, with a tokenizer of "
        "bytes and control tokens. *As written*: a transcript without thoughts is, token by token, "
        "what the template writes of the conversation; elsewhere it appends, and keeps in a row "
        "what the policy read and wrote (`policy.thoughts=cut`: a row a turn, without earlier "
        "thoughts).",
        "",
        "| template | a reply ends with | opens `<think>` | window | transcript | system message |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(FACTS):
        window, made = (encoder(name, memory) for memory in get_args(Memory))
        ended = str(made.tokenizer.convert_ids_to_tokens(made.end_id))
        fine = "fine" if len(list(play(window, "go", ended))) == 3 else "refused"
        prompts = list(play(made, "go", ended))
        kept = "as written" if prompts[-1][1] == whole(made, "go") else "appends"
        place = "first user message" if made._merges_system else "its own"
        opens = "yes" if made._opened else ""
        lines.append(f"| {name} | `{ended}` | {opens} | {fine} | {kept} | {place} |")
    return "\n".join([*lines, ""])
