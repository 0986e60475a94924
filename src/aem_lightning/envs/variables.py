"""The environment variables of a worker: an allow-list, since the trainer's own hold secrets."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

ALLOWED = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|LANG|LANGUAGE|LC_.*|TMPDIR|TEMP|TMP|XDG_.*"
    "|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|JAVA_HOME|COVERAGE_.*|PYTHON.*"
    "|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CUDA_VISIBLE_DEVICES"
    "|DOCKER_HOST|DOCKER_CONTEXT|DOCKER_CONFIG|DOCKER_CERT_PATH|DOCKER_TLS_VERIFY"
    "|CONTAINER_HOST|CONTAINERS_CONF|CONTAINERS_STORAGE_CONF"
    "|HF_HOME|HF_DATASETS_CACHE|HF_HUB_CACHE|HF_HUB_OFFLINE"
    "|OMP_.*|MKL_.*|OPENBLAS_.*|ALFWORLD_.*|WEBSHOP_.*|SWE_.*|AEM_LIGHTNING_.*"
)
SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


def worker_variables(more: Sequence[str] = ()) -> dict[str, str]:
    """The trainer's variables that a worker gets, and our own: import path, hash seed, one thread.

    Args:
        more: Names of others, which may be secrets.
    """
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in more or (ALLOWED.fullmatch(name) and not SECRET.search(name))
    }
    return passed | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
