"""Environments that each break one promise of the contract; light, since workers import them."""

from __future__ import annotations

import itertools
import os
import threading
import time

from toy_text_env import ToyEnv


class Plain(ToyEnv):
    """The toy without what differs between its copies."""

    def _info(self, *, valid):
        info = super()._info(valid=valid)
        return {key: info[key] for key in ("task_id", "admissible_actions", "is_action_valid")}


class Forgetful(Plain):
    counter = itertools.count()

    def _observation(self):
        return f"{super()._observation()} {next(self.counter)}"


class Deaf(Plain):
    def _info(self, *, valid):
        return super()._info(valid=True)


class Choosy(Plain):
    def _info(self, *, valid):
        return super()._info(valid=False)


class Gymless(Plain):
    def step(self, action):
        return super().step(action)[:4]


class Wordless(Plain):
    def reset(self, *, seed=None, options=None):
        return 7, super().reset(seed=seed, options=options)[1]


class Fragile(Plain):
    """Does not come back after an exception."""

    broken = False

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        return ("broken" if self.broken else observation), info

    def step(self, action):
        if not isinstance(action, str):
            self.broken = True
            raise TypeError(action)
        return super().step(action)


class Sticky(Plain):
    """Does not start over in the middle of an episode."""

    trace = ()

    def reset(self, *, seed=None, options=None):
        if self.trace and self.trace[0] == options["task_id"]:
            return self._observation(), self._info(valid=True)
        return super().reset(seed=seed, options=options)


class Misnamed(Plain):
    def _info(self, *, valid):
        return super()._info(valid=valid) | {"task_id": "another"}


class NoDoor(Plain):
    is_shut = False

    def close(self):
        if self.is_shut:
            raise RuntimeError("closed already")
        self.is_shut = True


class Endless(Plain):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float("nan"), *rest


class Stuck(Plain):
    """Hangs at the second action."""

    def step(self, action):
        if len(self.trace) > 3:
            time.sleep(600)
        return super().step(action)


class Ending(Plain):
    """Ends the process that it is in."""

    def step(self, action):
        os._exit(3)


class Torn(Plain):
    def reset(self, *, seed=None, options=None):
        return "half of \ud83d", super().reset(seed=seed, options=options)[1]


class Halfway(Plain):
    def _info(self, *, valid):
        return super()._info(valid=valid) | {"won": 0.5}


class Mute:
    """No environment: nothing to step, nothing to close."""

    def reset(self, *, seed=None, options=None):
        return "", {}


ONLY_ONE = Plain()


def the_only_one():
    return ONLY_ONE


class Alike(Plain):
    """Plays one and the same task, whatever it is asked for."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.trace = ["always"]
        return self._observation(), self._info(valid=True)


class Swallower(Plain):
    """Takes the nothing of an empty response for an action."""

    def step(self, action):
        *results, info = super().step(action)
        return *results, info | {"is_action_valid": action == "" or info["is_action_valid"]}


class Bound(Plain):
    """Its episodes depend on the process that plays them."""

    def _observation(self):
        return f"{super()._observation()} {os.getpid()}"


class Hoarder(Plain):
    """Keeps one more thing after every reset; what, is decided by ``hoard``."""

    hoard = None

    def reset(self, *, seed=None, options=None):
        self.kept = getattr(self, "kept", [])
        self.kept.append(type(self).hoard())
        return super().reset(seed=seed, options=options)

    def close(self):
        for thing in getattr(self, "kept", ()):
            getattr(thing, "close", lambda: None)()
        self.kept = []
        super().close()


class Opener(Hoarder):
    hoard = staticmethod(lambda: open(os.devnull, "rb"))  # noqa: SIM115 (the leak)


class Waiting(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.start()

    def run(self):
        self.over.wait()

    def close(self):
        self.over.set()


class Spawner(Hoarder):
    hoard = Waiting


class Remembering(Hoarder):
    hoard = staticmethod(lambda: bytes(1000))


class Untold(Alike):
    def _info(self, *, valid):
        return {}


class Paying(Plain):
    """Sound, with a reward for each step and a win that it names, or does not."""

    def __init__(self, reward, wins=False):
        super().__init__()
        self.pay = reward, wins

    def step(self, action):
        observation, *_, ended, truncated, info = super().step(action)
        reward, wins = self.pay
        return observation, reward, ended, truncated, {**info, "won": wins and ended}
