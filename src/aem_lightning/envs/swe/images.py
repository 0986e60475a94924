"""The container images of data sets, by the names that they are published under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of SWE-bench, each version of which has a test command of its own.
REPOSITORIES = frozenset(
    {
        *("astropy/astropy", "django/django", "marshmallow-code/marshmallow", "sympy/sympy"),
        *("matplotlib/matplotlib", "mwaskom/seaborn", "pallets/flask", "psf/requests"),
        *("pvlib/pvlib-python", "pydata/xarray", "pydicom/pydicom", "pylint-dev/astroid"),
        *("pylint-dev/pylint", "pytest-dev/pytest", "pyvista/pyvista", "sphinx-doc/sphinx"),
        *("scikit-learn/scikit-learn", "sqlfluff/sqlfluff"),
    }
)
SWE_GYM = frozenset(
    {
        *("bokeh/bokeh", "conan-io/conan", "dask/dask", "facebookresearch/hydra", "getmoto/moto"),
        *("iterative/dvc", "modin-project/modin", "pandas-dev/pandas", "project-monai/monai"),
        *("pydantic/pydantic", "python/mypy"),
    }
)


def image_of(row: Mapping[str, Any]) -> str | None:
    """The image of a row: as it names it, else as its data set publishes it; None: of neither.

    >>> image_of({"repo": "pallets/flask", "instance_id": "pallets__flask-4992"})
    'swebench/sweb.eval.x86_64.pallets_1776_flask-4992:latest'
    >>> image_of({"repo": "python/mypy", "instance_id": "python__mypy-1"})
    'xingyaoww/sweb.eval.x86_64.python_s_mypy-1:latest'
    >>> image_of({"repo": "a/b", "image_name": "swesmith.x86_64.a__b.1234"})
    'jyangballin/swesmith.x86_64.a_1776_b.1234'
    >>> image_of({"repo": "a/b", "dockerhub_tag": "a.b-a__b-1"})
    'jefzda/sweap-images:a.b-a__b-1'
    """
    named = row.get("image") or row.get("docker_image") or row.get("image_name")
    if named:
        is_short = named.startswith("swesmith.")  # which the first rows of SWE-smith are
        return f"jyangballin/{named.replace('__', '_1776_')}" if is_short else str(named)
    if row.get("dockerhub_tag"):
        return f"jefzda/sweap-images:{row['dockerhub_tag']}"
    repo = row["repo"].lower()
    name = str(row.get("instance_id") or "").lower()
    if repo in SWE_GYM:
        return f"xingyaoww/sweb.eval.x86_64.{name.replace('__', '_s_')}:latest"
    owners = {"swerebench": row.get("install_config"), "swebench": repo in REPOSITORIES}
    owner = next((owner for owner, is_theirs in owners.items() if is_theirs), None)
    return owner and f"{owner}/sweb.eval.x86_64.{name.replace('__', '_1776_')}:latest"
