import random
import string

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webshop_players import shop, shop_folder

from aem_lightning.envs.webshop import WebShopEnv, task_id

# What a shopper may say: what the page offers, words of the shop, and anything at all.
WORDS = st.sampled_from(["search", "click", "[", "]", "<", "prev", "next", ">", "buy", "tent"])
SAID = st.one_of(
    st.integers(0, 10**6),
    st.lists(WORDS, max_size=6).map(" ".join),
    st.text(max_size=30),
    st.text(max_size=20).map(lambda text: f"search[{text}]"),
    st.text(max_size=20).map(lambda text: f"click[{text}]"),
)


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(said=st.lists(SAID, max_size=15), number=st.integers(0, 2000), rich=st.booleans())
def test_pages_keep_their_promises_whatever_is_said(said, number, rich):
    """Numbers stand for the offered action of that place, modulo how many there are."""
    folder = shop_folder("medium")
    env = WebShopEnv(folder, observation="text_rich" if rich else "text")
    number %= shop("medium").num_goals
    before, info = env.reset(options={"task_id": task_id(number)})
    for word in said:
        offered = info["admissible_actions"]
        is_offered = isinstance(word, int)
        action = offered[word % len(offered)] if is_offered else word
        text, reward, over, truncated, info = env.step(action)
        assert not truncated
        assert 0.0 <= reward <= 1.0
        assert info["goal"] in text or over
        assert info["won"] == (info["score"] == 1.0)
        assert len(set(info["admissible_actions"])) == len(info["admissible_actions"])
        shown = " ".join(text.lower().split())
        assert all(name[6:-1] in shown for name in info["admissible_actions"][1:])
        if is_offered:
            assert info["is_action_valid"]
        if not info["is_action_valid"]:
            assert (text, reward, over) == (before, 0.0, False)
        if over:
            assert action == "click[buy now]" or not is_offered
            assert info["admissible_actions"] == ()
            break
        before = text


def test_ten_thousand_malformed_actions_break_nothing():
    """Real ones with letters put in, taken out and mixed up."""
    rng = random.Random(0)
    env = WebShopEnv(shop_folder("hard"))
    goals = shop("hard").num_goals
    letters = string.printable + "[]<>›毛é\u0000\u2028🛒"
    over, info = True, {}
    for _ in range(10_000):
        if over:
            _, info = env.reset(options={"task_id": task_id(rng.randrange(goals))})
        base = list(rng.choice((*info["admissible_actions"], "search[tent]", "click[x]", "[[]]")))
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(base) + 1)
            base[place : place + rng.randrange(3)] = rng.choices(letters, k=rng.randrange(4))
        if rng.random() < 0.01:
            base *= rng.randrange(200)
        _, reward, over, _, info = env.step("".join(base))
        assert 0.0 <= reward <= 1.0
