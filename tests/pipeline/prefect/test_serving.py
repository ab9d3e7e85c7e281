"""Two clones in folders of one name share a server: each has its own deployment, runs and cards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client

from pipeline.errors import PipelineError
from pipeline.prefect import identity
from pipeline.prefect.history import last_runs
from tests.pipeline.project import Project, create, environment, until

pytestmark = pytest.mark.slow


@pytest.fixture
def clones(tmp_path: Path) -> list[Project]:
    roots = [tmp_path / person / "dualign" for person in ("alice", "bob")]
    for root in roots:
        root.mkdir(parents=True)
    return [create(root) for root in roots]


@pytest.fixture
def client(server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as made:
        yield made


def serve(clone: Project, server: str, **told: str) -> subprocess.Popen[str]:
    settings = {"PREFECT_API_URL": server, "PREFECT_RUNNER_POLL_FREQUENCY": "1", **told}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "serve"],
        cwd=clone.root,
        env={**environment(), **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop(*serving: subprocess.Popen[str]) -> None:
    for process in serving:
        process.send_signal(signal.SIGINT)
    for process in serving:
        process.communicate(timeout=60)


def test_each_runs_what_is_asked_of_it(
    clones: list[Project], server: str, client: SyncPrefectClient
) -> None:
    serving = [serve(clone, server) for clone in clones]
    names = [identity.name(clone.root) for clone in clones]
    try:
        until(lambda: set(names) <= {made.name for made in client.read_deployments()}, 120)
        made = [client.read_deployment_by_name(f"alignment/{name}") for name in names]
        for clone, deployment in zip(clones, made, strict=True):
            assert str(clone.root) in str(deployment.description)
        asked = {"stages": ["first"], "set": {"first.value": 42}, "force": True}
        run = client.create_flow_run_from_deployment(made[0].id, parameters=asked, name="my try")

        def completed() -> bool:
            state = client.read_flow_run(run.id).state
            return state is not None and state.is_completed()

        until(completed, 120)
        assert [
            json.loads(clone.root.joinpath("params.yaml").read_text().split("#")[0])["first"][
                "value"
            ]
            for clone in clones
        ] == [42, 0]
        assert any("my try: first first.value=42 forced" in line for line in last_runs(5, names[0]))
        assert "none yet" in "".join(last_runs(5, names[1]))
    finally:
        stop(*serving)


def test_a_name_that_another_workspace_serves_is_refused(
    clones: list[Project], server: str, client: SyncPrefectClient
) -> None:
    alice, bob = clones
    first = serve(alice, server, DUALIGN_WORKSPACE="ours")
    try:
        until(
            lambda: [
                made
                for made in client.read_deployments()
                if made.name == "ours" and made.last_polled
            ],
            120,
        )
        again = serve(alice, server, DUALIGN_WORKSPACE="ours")
        assert (
            f"this workspace is served already (process {first.pid})"
            in again.communicate(timeout=120)[0]
        )
        other = serve(bob, server, DUALIGN_WORKSPACE="ours")
        said = other.communicate(timeout=120)[0]
        assert other.returncode == 2
        assert (
            f"alignment/ours is served by {identity.place(alice.root)}; give this one a name of"
            " its own" in said
        )
    finally:
        stop(first)
    first = serve(alice, server, DUALIGN_WORKSPACE="ours")  # the same one may come back at once
    until(lambda: client.read_deployment_by_name("alignment/ours").paused is False, 120)
    stop(first)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(identity.VARIABLE, raising=False)
    for folder in ("a/dualign", "b/dualign"):
        (tmp_path / folder).mkdir(parents=True)
    one = identity.name(tmp_path / "a/dualign")
    other = identity.name(tmp_path / "b/dualign")
    assert (
        one != other and one.startswith("dualign-") and one == identity.name(tmp_path / "a/dualign")
    )
    assert identity.token(tmp_path / "a") != identity.token(tmp_path / "b")
    assert identity.of_tags({"cpu", identity.tag(one)}) == one and identity.of_tags(set()) == ""
    monkeypatch.setenv(identity.VARIABLE, "ours")
    assert identity.name(tmp_path) == "ours"
    monkeypatch.setenv(identity.VARIABLE, "a/b")
    with pytest.raises(PipelineError, match=r"DUALIGN_WORKSPACE=a/b: a name without blanks"):
        identity.name(tmp_path)
