"""The flow as a deployment on a Prefect server, served from this workspace and from no other."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import DeploymentStatus
from prefect.exceptions import ObjectNotFound

from pipeline.errors import PipelineError
from pipeline.holding import held
from pipeline.prefect import identity
from pipeline.prefect.flow import NAME, alignment

_ABOUT = "Runs the stages of dvc.yaml in {place}, one run at a time. Its id is {token}."
_TOLD = re.compile(re.escape(_ABOUT).replace(r"\{place\}", "(.*)").replace(r"\{token\}", r"(\w+)"))


def serve(root: Path) -> None:
    """Offer the flow until somebody interrupts.

    Raises PipelineError where this workspace is served already, or another one of its name is.
    """
    with held(root / ".dvc" / "tmp" / "serve.lock", "this workspace is served already"):
        name = identity.name(root)
        check_free(root, name)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(root), os.environ.get("PYTHONPATH", "")]
        )  # for its flow runs
        os.environ[identity.VARIABLE] = name
        about = _ABOUT.format(place=identity.place(root), token=identity.token(root))
        alignment.serve(name=name, limit=1, description=about, tags=[identity.tag(name)])


def check_free(root: Path, name: str) -> None:
    """Raise PipelineError where another workspace serves a deployment of this name.

    Prefect would give the runs of one deployment to whoever asks first.
    """
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"{NAME}/{name}")
        except ObjectNotFound:
            return
    match = _TOLD.fullmatch(deployment.description or "")
    if deployment.status != DeploymentStatus.READY or (match and match[2] == identity.token(root)):
        return  # nobody has asked for its runs in the last minute, or it was this workspace
    raise PipelineError(
        f"{NAME}/{name} is served by {match[1] if match else 'another workspace'}; give this one a"
        f" name of its own, export {identity.VARIABLE}=NAME, or if that one has just ended, wait a"
        " minute"
    )
