"""Gold first: which rows of a data set can be played, found out before anything learns from them.

``python -m aem_lightning.envs.swe.validate rows.json --repositories clones`` grades the fix of each
row, which has to earn 1, and no change at all, which has to earn 0. The verdicts are kept beside
the rows, one a line, and hold as long as the row does. With ``--pull-only``, it fetches the images
of the rows and grades nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from aem_lightning.envs.base import EnvPoolError
from aem_lightning.envs.swe.env import grade_change
from aem_lightning.envs.swe.grading import JUDGE, Grade
from aem_lightning.envs.swe.instances import ADAPTERS, SOURCES, Instance, load_instances
from aem_lightning.envs.swe.repositories import Repositories
from aem_lightning.envs.swe.sandbox import DockerSandbox, Limits, Sandbox
from aem_lightning.envs.swe.sandbox.images import pull_all
from aem_lightning.envs.swe.settings import SweSettings, choose_sandbox

logger = logging.getLogger(__name__)

VERDICTS = "verdicts.jsonl"
_NO_IMPORT = "its environment does not import"
# What a log says of causes that have a name.
_CAUSES = {
    "its tests need the network": re.compile(
        r"name resolution|could not resolve|network is unreachable|max retries exceeded"
        r"|getaddrinfo|no matching distribution|failed to establish a new connection",
        re.IGNORECASE,
    ),
    _NO_IMPORT: re.compile(r"\b(ModuleNotFoundError|ImportError)\b"),
}


@dataclass(frozen=True)
class Verdict:
    """What became of a row.

    Attributes:
        instance_id: The row's.
        key: Stands for the row and for how it was graded: another key is another verdict.
        problem: Why it cannot be played; empty where it can.
        is_final: It hangs on the row alone; else, as where a machine broke, the row is tried again.
    """

    instance_id: str
    key: str
    problem: str = ""
    is_final: bool = True


def validate(
    instances: Sequence[Instance], settings: SweSettings, kept: Path, *, workers: int = 2
) -> dict[str, Verdict]:
    """The verdict on each instance by its id: as it was kept, the others after grading.

    Args:
        instances: What is to be played.
        settings: How: where commands run, clones, limits.
        kept: The file of verdicts; each is appended as it is known.
        workers: Instances that are graded at once.

    Raises:
        EnvPoolError: No sandbox works here.
        ValueError: None does for these instances.
    """
    located = [Repositories(settings.repositories).located(one) for one in instances]
    known = read_verdicts(kept, located, settings)
    final = {name for name, verdict in known.items() if verdict.is_final}
    waiting = [one for one in located if one.instance_id not in final]
    if not waiting:
        return known
    sandbox = choose_sandbox(settings, has_images=any(one.image for one in waiting))
    logger.info("grading %d instances before their first use: fix and no change", len(waiting))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool, kept.open("a", encoding="utf-8") as file:
        found = pool.map(lambda one: validate_instance(sandbox, settings, one), waiting)
        for number, verdict in enumerate(found, 1):
            known[verdict.instance_id] = verdict
            file.write(json.dumps(asdict(verdict)) + "\n")
            file.flush()
            text = "%d of %d: %s %s"
            said = f"is left out: {verdict.problem}" if verdict.problem else "can be played"
            logger.info(text, number, len(waiting), verdict.instance_id, said)
    return known


def validate_instance(sandbox: Sandbox, settings: SweSettings, instance: Instance) -> Verdict:
    """Grade the fix of an instance, where it has one, and no change."""
    name, key = instance.instance_id, _key(instance, settings)
    try:
        files = Repositories(settings.repositories).base(instance)
    except (FileNotFoundError, ValueError) as error:
        return Verdict(name, key, str(error), is_final=False)
    for diff, wanted in ((instance.patch, True), ("", False)):
        if not diff and wanted:
            continue  # a row without its fix, as of a test set: half of the proof
        grade = grade_change(sandbox, settings, instance, files, diff)
        if grade.infra_error:
            return Verdict(name, key, _explained(grade), is_final=False)
        if grade.resolved != wanted:
            if not wanted:
                return Verdict(name, key, "doing nothing earns 1")
            # Files run with the packages that the sandbox has, and somebody may install more.
            lacks = instance.image is None and _CAUSES[_NO_IMPORT].search(grade.report)
            said = f"its fix earns 0: {_explained(grade)}"
            return Verdict(name, key, said, is_final=not lacks)
    return Verdict(name, key)


def read_verdicts(
    kept: Path, instances: Iterable[Instance], settings: SweSettings
) -> dict[str, Verdict]:
    """The kept verdicts on these instances, by their ids."""
    keys = {_key(instance, settings) for instance in instances}
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(Verdict(**json.loads(line)))
        except (TypeError, ValueError):  # half a line of a run that was stopped
            continue
    return {verdict.instance_id: verdict for verdict in found if verdict.key in keys}


def _key(instance: Instance, settings: SweSettings) -> str:
    graded = {**asdict(instance), "problem_statement": "", "by": settings.image}
    if instance.image is None:  # another release's judge may read what this one could not
        graded["judge"] = JUDGE
    return hashlib.sha256(json.dumps(graded, sort_keys=True).encode()).hexdigest()[:16]


def _explained(grade: Grade) -> str:
    causes = [cause for cause, words in _CAUSES.items() if words.search(grade.report)]
    return "; ".join([*causes[:1], grade.reason])


def fetch_images(instances: Iterable[Instance], settings: SweSettings, workers: int) -> list[str]:
    """Pull the images that instances are played in; those that cannot be had.

    Raises:
        EnvPoolError: No containers work here.
    """
    images = [image for one in instances if (image := one.image or settings.image)]
    found = DockerSandbox().probe()
    if images and not found.usable:
        raise EnvPoolError(f"images cannot be pulled: {found.reason}. Install docker or podman")
    images = list(dict.fromkeys(images))
    missing = pull_all(images, workers)
    logger.info("%d of %d images are here", len(images) - len(missing), len(images))
    if missing:
        logger.error("these are not: %s", ", ".join(missing))
    return missing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status is 1 where a row cannot be played, or an image not be had."""
    parser = argparse.ArgumentParser(description="Grade the fixes of SWE instances, and nothing.")
    parser.add_argument("path", help="the file, or the name on the hub")
    parser.add_argument("--source", choices=SOURCES[1:], default="json")
    parser.add_argument("--split", default="test", help="of a data set on the hub")
    parser.add_argument("--adapter", choices=ADAPTERS, default="auto")
    parser.add_argument("--max-instances", type=int)
    parser.add_argument("--repositories", help="a folder of clones, for rows without an image")
    parser.add_argument("--sandbox", default="auto", help="auto, bubblewrap, docker or local")
    parser.add_argument("--allow-unsafe", action="store_true", help="also without isolation")
    parser.add_argument("--image", help="for docker: one with git, python3 and pytest")
    parser.add_argument("--memory-gb", type=float, default=4.0)
    parser.add_argument("--disk-gb", type=float, help="to write; default: 4 for images, else 0.25")
    parser.add_argument("--images-gb", type=float, help="of pulled images, before some go")
    parser.add_argument("--processes", type=int, default=256)
    parser.add_argument("--grade-s", type=float, default=300.0)
    parser.add_argument("--workers", type=int, default=2, help="at once")
    parser.add_argument("--pull-only", action="store_true", help="fetch the images, grade nothing")
    parser.add_argument("--verdicts", help=f"default: {VERDICTS} beside the file")
    given = parser.parse_args(arguments)
    if given.pull_only and given.images_gb is not None:
        parser.error("--pull-only fetches every image and removes none: leave --images-gb out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    instances = load_instances(
        given.source,
        given.path,
        split=given.split,
        adapter=given.adapter,
        max_instances=given.max_instances,
    )
    located = [Repositories(given.repositories).located(one) for one in instances]
    disk_gb = given.disk_gb or (4.0 if any(one.image for one in located) else 0.25)
    settings = SweSettings(
        given.sandbox,
        given.allow_unsafe,
        given.repositories,
        grade_s=given.grade_s,
        image=given.image,
        images_gb=given.images_gb,
        limits=Limits(
            memory_bytes=int(given.memory_gb * 2**30),
            processes=given.processes,
            disk_bytes=int(disk_gb * 2**30),
        ),
    )
    if given.pull_only:
        return int(bool(fetch_images(located, settings, given.workers)))
    beside = Path() if given.source == "hub" else Path(given.path).expanduser().parent
    kept = Path(given.verdicts) if given.verdicts else beside / VERDICTS
    verdicts = validate(instances, settings, kept, workers=given.workers)
    failed = sum(bool(verdicts[instance.instance_id].problem) for instance in instances)
    logger.info(
        "%d of %d can be played; verdicts in %s", len(instances) - failed, len(instances), kept
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
