"""The documents against the code: each setting, flag, metric, route and link that they name exists; none is missing."""

from __future__ import annotations

import re
import time
from pathlib import Path
from random import Random

import pytest
from starlette.routing import Route

from kvbaton.cluster.client.client import ClusterClient
from kvbaton.cluster.config.config_command import annotated_yaml, markdown_table
from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.http.metrics import HttpMetrics
from kvbaton.cluster.ingress.engine_metrics import EngineMetrics
from kvbaton.cluster.store.registry import Membership
from kvbaton.cluster.store.store import MemoryStore
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router
from support.http_support import ScriptedClient, load_tokenizer, make_service, say

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = (ROOT / "docs" / "operators.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def table_keys(pattern: str) -> list[str]:
    """What stands in the first column of the operators' tables and matches."""
    return re.findall(rf"^\| `({pattern})`", OPERATORS, re.MULTILINE)


def test_the_settings_are_documented_as_the_code_has_them() -> None:
    """Guards operators against a setting, default, range or flag that is not what the code has."""
    assert markdown_table() in OPERATORS, "paste what `kvbaton config --markdown` prints"


def test_the_example_file_shows_every_setting() -> None:
    """Guards the file that users copy from."""
    written = (ROOT / "deploy" / "cluster.yaml").read_text()
    assert written == annotated_yaml(), "kvbaton config > deploy/cluster.yaml"


def test_every_metric_is_documented_and_exists() -> None:
    """Guards dashboards: a renamed metric must be renamed here too, and one whose type changes must say so."""
    metrics = HttpMetrics()
    membership = Membership(MemoryStore())
    client = ClusterClient(membership, Router(RouterConfig(), time.monotonic, Random(0)), b"", "docs")
    metrics.registry.register(EngineMetrics(lambda: membership.engines, client))
    scraped = re.findall(r"^# TYPE (\S+) (\S+)$", metrics.render(), re.MULTILINE)
    documented = re.findall(r"^\| `(kvbaton_[a-z_]+)` \| ([a-z]+) \|", OPERATORS, re.MULTILINE)
    assert sorted(documented) == sorted((name, kind) for name, kind in scraped if not name.endswith("_created"))


def test_every_route_is_documented(tmp_path: Path) -> None:
    """Guards the route table against the application's own list, whatever the method."""
    tokenizer = load_tokenizer(tmp_path)
    app = create_app(make_service(ScriptedClient(say(tokenizer, "")), tokenizer))
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert routes == app.routes  # nothing is mounted that this test does not see
    served = [(method, route.path.replace(":path", "")) for route in routes for method in route.methods or ()]
    documented = re.findall(r"`([A-Z]+) (/[^`]*)`", OPERATORS)
    assert sorted(documented) == sorted(served)


def test_the_readme_shows_how_to_start_within_forty_lines() -> None:
    """Guards the order of the README: a sentence, a picture, the two commands and a curl come first."""
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for needed in ("docs/img/overview.svg", "make serve", "make test", "curl -N"):
        assert needed in head


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_inside_the_repository_lead_somewhere(document: Path) -> None:
    """Guards against links to files that were moved or never written."""
    targets = re.findall(r"\]\(([^)#]+)", document.read_text())
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert missing == []


FOLDERS = "benchmarks|cluster|decode_worker|deploy|docs|engine|kernels|kvtransfer|prefill_worker|router|src|tests"


def named_files(text: str) -> set[str]:
    """Files and folders of this repository that a text names from its root, in prose, commands and code blocks."""
    found = re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*)(?![\w/*<{{])", text)
    return {name.rstrip(".") for name in found}


def exists(name: str) -> bool:
    """Capitals stand for something: `cpu_floor_MODEL_N.json`."""
    return any(ROOT.glob(re.sub(r"(?<=_)[A-Z]+", "*", name)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_files_that_documents_name_exist(document: Path) -> None:
    """Guards against names of files and folders that are no longer there."""
    assert [path for path in sorted(named_files(document.read_text())) if not exists(path)] == []


def test_the_check_of_names_sees_them_everywhere() -> None:
    """Guards the check itself: a pattern that finds nothing lets every document pass."""
    text = "`engine/gone.py`, `python benchmarks/gone.py -x`\n    pytest tests/gone/\ndocs/a_0.6b.md. Not a/engine/b.py"
    assert named_files(text) == {"engine/gone.py", "benchmarks/gone.py", "tests/gone/", "docs/a_0.6b.md"}
    assert not any(exists(name) for name in named_files(text))
    assert exists("docs/results/cpu-2core/cpu_floor_MODEL_DTYPE_N.json")


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_make_targets_that_documents_name_exist(document: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^ {4})make ([a-z-]+)", document.read_text(), re.MULTILINE)
    assert [name for name in named if name not in targets] == []
