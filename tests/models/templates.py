"""Chat templates of real models, made anew and small, and what an encoder makes of each.

``python -m models.templates FOLDER ...`` holds them against the genuine files below the folders, as
the packages named in `GENUINE` bring them, and tells those that differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from jinja2.exceptions import TemplateError
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
    *("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"),
    *("<|startoftext|>", "<|extra_0|>", "<|extra_4|>", "<|eos|>", "<|begin_of_sentence|>"),
    *("<|channel>", "<channel|>", "<|inner_prefix|>", "<|inner_suffix|>", "<|call|>"),
    *("<|developer_start|>", "<|developer_end|>", "<|START_THINKING|>", "<|END_THINKING|>"),
    *("[THINK]", "[/THINK]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]"),
    *("<tool_call>", "</tool_call>"),
]


@dataclass(frozen=True)
class Fact:
    """What is to come of a template.

    Attributes:
        eos: The tokenizer's end of sequence.
        end: The token that closes a reply.
        opens: The template opens the reasoning in the prompt.
        same: A transcript without thoughts is, token by token, what the template writes of it.
        thought: How the model opens and closes a thought.
        calls: How the template writes calls of tools, and who answers; nothing where it is refused.
    """

    eos: str
    end: str
    opens: bool = False
    same: bool = True
    thought: tuple[str, str] = ("<think>", "</think>")
    calls: tuple[str, str] | None = None


_IM = Fact("<|im_end|>", "<|im_end|>")
_S = Fact("</s>", "</s>")
_EOT = Fact("<|eot_id|>", "<|eot_id|>")
FACTS = {
    **dict.fromkeys(("qwen3", "smollm2", "smollm3", "chatml"), _IM),
    "qwen2_5": replace(_IM, calls=("hermes", "tool")),
    "qwen3_coder": replace(_IM, calls=("coder", "tool")),
    **dict.fromkeys(("yi", "internlm2", "lfm2", "minicpm4", "kimi_k2", "phi4"), _IM),
    **dict.fromkeys(("qwq", "qwen3_5"), Fact("<|im_end|>", "<|im_end|>", opens=True, same=False)),
    **dict.fromkeys(("llama3_1", "llama3_2", "llama3_3"), replace(_EOT, calls=("llama", "tool"))),
    # A blank before each reply, which the prompt that asks for it has not.
    **dict.fromkeys(("llama2", "mistral_v1", "mistral_v3", "mixtral"), replace(_S, same=False)),
    "mistral_tekken": replace(_S, calls=("mistral", "user")),
    "magistral": replace(_S, thought=("[THINK]", "[/THINK]"), calls=("tekken", "tool")),
    "ernie4_5": _S,
    "hunyuan": Fact("<|eos|>", "<|eos|>"),
    **dict.fromkeys(("granite3_3", "granite4"), Fact("<|end_of_text|>", "<|end_of_text|>")),
    "deepseek_v3": Fact("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek_r1_distill": Fact("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", True, False),
    "gpt_oss": Fact(
        *("<|return|>", "<|return|>", False, False),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ),
    **dict.fromkeys(("gemma2", "gemma3"), Fact("<eos>", "<end_of_turn>")),
    "gemma4": Fact("<eos>", "<turn|>", same=False, thought=("<|channel>thought\n", "<channel|>")),
    "phi3_5": Fact("<|endoftext|>", "<|end|>"),
    "glm4_6": Fact("<|endoftext|>", "<|user|>", same=False),
    "apertus": Fact("</s>", "<|assistant_end|>", thought=("<|inner_prefix|>", "<|inner_suffix|>")),
    "command_r": Fact(
        *("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        thought=("<|START_THINKING|>", "<|END_THINKING|>"),
    ),
    **dict.fromkeys(("olmo2", "falcon3"), Fact("<|endoftext|>", "<|endoftext|>")),
    "zephyr": _S,
    "seed_oss": Fact("<seed:eos>", "<seed:eos>", thought=("<seed:think>", "</seed:think>")),
}
# The genuine file that each was held against, by the package that brings it; others: from memory.
GENUINE = {
    "trl": {
        **{name: f"{name}.jinja" for name in ("qwen2_5", "qwen3", "gemma3", "lfm2", "phi3_5")},
        **{"gpt_oss": "gptoss.jinja", "command_r": "cohere.jinja"},
        **{name: f"{name}.jinja" for name in ("llama3_1", "llama3_2", "deepseek_r1_distill")},
    },
    "llama-cpp-python": {
        "apertus": "Apertus-8B-Instruct.jinja",
        "gemma2": "google-gemma-2-2b-it.jinja",
        "gemma4": "google-gemma-4-31B-it.jinja",
        "glm4_6": "GLM-4.6.jinja",
        "granite3_3": "ibm-granite-granite-3.3-2B-Instruct.jinja",
        "granite4": "ibm-granite-granite-4.0.jinja",
        "kimi_k2": "Kimi-K2-Instruct.jinja",
        "llama3_3": "meta-llama-Llama-3.3-70B-Instruct.jinja",
        "magistral": "mistralai-Ministral-3-14B-Reasoning-2512.jinja",
        "mistral_tekken": "mistralai-Mistral-Nemo-Instruct-2407.jinja",
        "qwen3_5": "Qwen3.5-4B.jinja",
        "qwen3_coder": "Qwen3-Coder.jinja",
        "qwq": "Qwen-QwQ-32B.jinja",
        "seed_oss": "ByteDance-Seed-OSS.jinja",
        "smollm3": "HuggingFaceTB-SmolLM3-3B.jinja",
    },
    "axolotl": {
        **{"deepseek_v3": "deepseek_v3.jinja", "phi4": "phi_4.jinja", "chatml": "chatml.jinja"},
        **{"mistral_v1": "mistral_v1.jinja", "mistral_v3": "mistral_v2v3.jinja"},
    },
}
HELD = {name: package for package, files in GENUINE.items() for name in files}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes and control tokens, with the template ``name``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = {"<think>", "</think>", "<seed:think>", "</seed:think>", "<tool_call>", "</tool_call>"}
    raw.add_tokens([AddedToken(t, special=t not in texts, normalized=False) for t in CONTROL])
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


def differs(name: str, genuine: str) -> bool:
    """Whether the template ``name`` writes a conversation in another way than the genuine one.

    Of a system message, two user messages and a reply between; without the system message where
    both refuse it.
    """
    system, *turns = (
        {"role": role, "content": text}
        for role, text in zip(
            ("system", "user", "assistant", "user"),
            ("Find the coin.", "a white box", "go", "an empty room"),
            strict=True,
        )
    )
    made = tokenizer(name)

    def written(template: str) -> list[str | None]:
        texts: list[str | None] = []
        for opening in ([system], []):
            for messages, reply in ((turns, True), (turns[:2], False)):
                try:
                    text = made.apply_chat_template(
                        [*opening, *messages],
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=reply,
                        **({"enable_thinking": True} if FACTS[name].opens else {}),
                    )
                except TemplateError:
                    text = None
                texts.append(text)
            if texts[0] is not None:
                return texts
        return texts

    return written(genuine) != written(str(made.chat_template))


def tools_of(name: str) -> str:
    """How the template ``name`` writes calls, and whose word an answer is."""
    try:
        made = PromptEncoder(tokenizer(name), replace(PROMPT, action="tool_call"))
    except ValueError as error:
        return "" if "no place" in str(error) else "refused"
    return f"{made._native.style}, {made._native.role}"


def page() -> str:
    """The table of templates for docs/models.md."""
    lines = [
        "## Chat templates",
        "",
        "What is known of each template, made anew as a small one (`tests/templates`), with a "
        "tokenizer of bytes and control tokens. *Held against*: the package whose genuine file "
        "writes a conversation of system, user, reply and user message in the same way "
        "(`python -m models.templates FOLDER` does it again); others are from memory. *Tools*: how "
        "calls are written and read with `prompt.action=tool_call`, and the role that answers; "
        "empty, where the small template tells none, refused, where they are written in a way that "
        "is not read here. *As written*: a transcript without thoughts is, token by token, what "
        "the template writes of the conversation; elsewhere it appends, and keeps in a row "
        "what the policy read and wrote (`policy.thoughts=cut`: a row a turn, without earlier "
        "thoughts).",
        "",
        "| template | held against | a reply ends with | opens `<think>` | window | transcript | "
        "system message | tools |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(FACTS):
        window, made = (encoder(name, memory) for memory in get_args(Memory))
        ended = str(made.tokenizer.convert_ids_to_tokens(made.end_id))
        fine = "fine" if len(list(play(window, "go", ended))) == 3 else "refused"
        prompts = list(play(made, "go", ended))
        kept = "as written" if prompts[-1][1] == whole(made, "go") else "appends"
        place = "first user message" if made._merges_system else "its own"
        opens = "yes" if made._opened else ""
        held = HELD.get(name, "memory")
        cells = (name, held, f"`{ended}`", opens, fine, kept, place, tools_of(name))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(folders: list[str]) -> None:
    """Hold the templates against the genuine files below ``folders``."""
    for files in GENUINE.values():
        for name, file in files.items():
            for path in (path for folder in folders for path in Path(folder).rglob(file)):
                told = "differs" if differs(name, path.read_text(encoding="utf-8")) else "equal"
                sys.stdout.write(f"{name}: {told}, {path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
