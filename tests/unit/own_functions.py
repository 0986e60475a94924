"""What a user brings: a checker, a prompt, tools; workers import it."""

from __future__ import annotations

import asyncio
import functools
import json
import urllib.request
from typing import Literal

ROWS = [{"a": number, "b": 2, "answer": number + 2} for number in range(20)]


def rows():
    return ROWS


def right(row, answer):
    return answer == str(row["answer"])


def strict(row, answer):
    return float(int(answer) == row["answer"])


def silent(row, answer):
    return None


def asked(row):
    return f"What is {row['a']} and {row['b']}?"


def thrifty(row, answer, calls):
    used = [call["name"] for call in calls]
    return float(answer == str(row["answer"])) - 0.25 * (used != ["add"])


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


def look(place: Literal["shelf", "box"], deep: bool = False) -> dict:
    """
    Look somewhere.

    Args:
        place: Where.
        deep: Under everything, too.
    """
    if place == "box":
        raise LookupError("the box is shut")
    return {"seen": ["a book"] * 3000 if deep else []}


def counted(function):
    """A decorator."""

    @functools.wraps(function)
    def call(*args, **given):
        return function(*args, **given)

    return call


@counted
def double(a: int) -> str:
    """Double a number."""
    return f"{2 * a} Äpfel"


def listed() -> list:
    """What there is."""
    return ["Äpfel"]


half_added = functools.partial(add, b=3)


def untyped(a):
    """Adds."""


def undescribed(a: int): ...


def many(*numbers: int):
    """Adds all."""


# Agents written against an OpenAI client.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]


def talk(client, row, **more):
    """Two calls, of which the second shows the reply to the first."""
    messages = [
        {"role": "developer", "content": "open a box"},
        {"role": "user", "content": [{"type": "text", "text": f"  red box {row['a']} "}]},
    ]
    first = client.chat.completions.create(model="any", messages=messages, **more)
    messages += [first.choices[0].message, {"role": "user", "content": "again"}]
    second = client.chat.completions.create(model="any", messages=messages, temperature=0.2)
    assert second.model_extra["ignored"] == ["temperature"]
    return second.choices[0].message.content == "white box"


def call_tools(client, row):
    """An agent with tools of its own."""
    messages = [{"role": "user", "content": f"{row['a']} and two"}]
    for _ in range(3):
        asked = client.chat.completions.create(model="any", messages=messages, tools=TOOLS)
        choice = asked.choices[0]
        if choice.finish_reason == "stop":
            return choice.message.content == str(row["answer"])
        messages.append(choice.message)
        for call in choice.message.tool_calls:
            given = json.loads(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(add(**given))})
    return 0.0


def by_address(base_url, row):
    """Without the package, in a stream."""
    body = {"messages": [{"role": "user", "content": str(row["a"])}], "stream": True}
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        first, last = (line for line in answer.read().decode().split("\n\n") if line)
    assert last == "data: [DONE]"
    return len(json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["content"])


async def at_once(client, row):
    """Two calls at the same time."""

    async def say(text):
        messages = [{"role": "user", "content": text}]
        reply = await client.chat.completions.create(model="any", messages=messages)
        return reply.choices[0].message.content

    return 0.5 * (await asyncio.gather(say("one"), say("two")) == ["to one", "to two"])


def idle(client, row):
    return 1.0


def leaving(client, row):
    client.chat.completions.create(model="any", messages=[{"role": "user", "content": "a"}])
    raise SystemExit(3)


def clumsy(client, row):
    talk(client, row)
    raise KeyError("a bug of the agent's")


def greedy(client, row):
    told = []
    for wrong in ({"n": 2}, {"messages": []}, {"messages": [{"role": "king", "content": ""}]}):
        try:
            client.chat.completions.create(**{"model": "any", "messages": [{}], **wrong})
        except Exception as error:
            told.append(str(error))
    try:
        client.completions.create(model="any", prompt="x")
    except Exception as error:
        told.append(str(error))
    client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": " ".join(told)}]
    )
    return 0.0
