import random
from functools import partial

from aem_lightning.envs import EnvPool, ResetRequest
from aem_lightning.envs.alfworld import AlfworldEnv, SearchingExpert

MAX_TURNS = 50
MUG_ON_SHELF = {
    "task_type": "pick_and_place_simple",
    "object_target": "Mug",
    "parent_target": "Shelf",
    "toggle_target": "",
}


def _play(root, games, *, seed=0, noise=0.0):
    """The actions of the expert in each game, and which games it won."""
    rng = random.Random(seed)
    experts = {game.id: SearchingExpert(game.params, seed) for game in games}
    actions = {game.id: [] for game in games}
    won = set()
    with EnvPool(partial(AlfworldEnv, root), workers=2) as pool:
        steps = pool.reset({g.id: ResetRequest(g.id, 0, i) for i, g in enumerate(games)})
        for _ in range(MAX_TURNS):
            sent = {
                key: experts[key].act(step.observation, step.admissible_actions)
                for key, step in steps.items()
            }
            for key, action in sent.items():
                words = experts[key].thought.split()
                assert 6 <= len(words) <= 14
                assert action not in experts[key].thought
            steps = {k: s for k, s in pool.step(sent).items() if not s.terminated}
