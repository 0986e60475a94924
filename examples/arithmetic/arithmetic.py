"""Sums in words: a data set, its checker, and whom the tiny policy imitates."""

from itertools import product

WHO, WHAT = ("ann", "bob", "eve", "joe", "kim", "sam"), ("apples", "books", "coins", "pens")


def questions():
    """The rows."""
    rows = product(range(1, 10), range(1, 10), WHO, WHAT)
    return [dict(zip(("a", "b", "who", "what"), row, strict=True)) for row in rows]


def reward(row, answer):
    """From a row and an answer to a number."""
    return float(answer == str(row["a"] + row["b"]))


def careless(row, random):
    """An answer that is wrong two times in five."""
    return str(row["a"] + row["b"] + random.choice((0, 0, 0, 1, -1)))


def agent(client, row):
    """The same as an agent of an OpenAI client, which asks twice where the first reply is none."""
    text = f"{row['who']} has {row['a']} {row['what']} and gets {row['b']} more . how many ?"
    messages = [{"role": "user", "content": text}]
    for _ in range(2):
        reply = client.chat.completions.create(model="policy", messages=messages)
        said = reply.choices[0].message.content
        if said.isdecimal():
            break
    return reward(row, said)
