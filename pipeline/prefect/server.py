"""The Prefect server that shows runs: where it is, who says so, and whether it answers."""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import signal
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

#: Seconds to wait for an answer.
PATIENCE = 10.0
#: Names of this machine, by which a proxy on another one would look for itself.
LOOPBACK = ("127.0.0.1", "localhost")


def past_proxies() -> None:
    """Have this process, and those that it starts, reach servers on this machine without the
    proxy that the environment names, as on the nodes of many clusters.
    """
    if urllib.request.getproxies() and not urllib.request.proxy_bypass(LOOPBACK[0]):
        spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, (spared, *LOOPBACK)))


def address() -> str:
    """The Prefect server's address, configured or where `prefect server start` puts it."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    return settings.api.url or f"http://{settings.server.api.host}:{settings.server.api.port}/api"


def origin(api: str) -> str:
    """Who configured the address, and how to take it back; empty where nobody did."""
    from prefect.context import get_settings_context
    from prefect.settings import PREFECT_API_URL, get_current_settings

    configured = get_current_settings().api.url
    if configured != api:
        return ""
    if os.environ.get("PREFECT_API_URL"):
        return "PREFECT_API_URL of this shell (unset PREFECT_API_URL)"
    profile = get_settings_context().profile
    if str(profile.settings.get(PREFECT_API_URL)) == configured:
        return (
            f"PREFECT_API_URL of Prefect's profile {profile.name} (prefect config unset"
            " PREFECT_API_URL)"
        )
    return "PREFECT_API_URL of .env, prefect.toml or pyproject.toml here (take it out)"


def reachable(api: str) -> bool:
    """Whether a Prefect server answers at this address; one on a busy machine takes seconds."""
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=PATIENCE) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def admitted(api: str) -> bool:
    """Whether a Prefect server that answers lets us in, by PREFECT_API_AUTH_STRING or without."""
    from prefect.settings import get_current_settings

    secret = get_current_settings().api.auth_string
    key = base64.b64encode(secret.get_secret_value().encode()).decode() if secret else ""
    asked = urllib.request.Request(
        f"{api.rstrip('/')}/admin/version", headers={"Authorization": f"Basic {key}"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE):
            return True
    except urllib.error.HTTPError as error:
        return error.code != 401
    except OSError:  # too busy to say; Prefect's client waits longer and tries again
        return True


def problem(api: str) -> str:
    """Why runs cannot use the server at `api`, with the remedy; empty where they can."""
    if reachable(api):
        if admitted(api):
            return ""
        return f"the Prefect server at {api} wants another PREFECT_API_AUTH_STRING=USER:PASSWORD"
    if reachable(f"{api.rstrip('/')}/api"):
        return f"PREFECT_API_URL={api} lacks its end: PREFECT_API_URL={api.rstrip('/')}/api"
    who = origin(api)
    if who:
        return (
            f"no Prefect server answers at {api}, which is from {who}; start that server, or take"
            f" the address back{_proxied(api)}"
        )
    return (
        f"no Prefect server at {api}; set PREFECT_API_URL, or start one in another terminal:"
        " prefect server start"
    )


def _proxied(api: str) -> str:
    """What to do, after a semicolon, where a proxy is asked for a server; else empty."""
    address = urllib.parse.urlsplit(api)
    host = address.hostname or ""
    if address.scheme not in urllib.request.getproxies() or urllib.request.proxy_bypass(host):
        return ""
    return f"; {address.scheme}_proxy is asked for it, export no_proxy={host},$no_proxy goes past"


def need() -> None:
    """Use the server configured, or this machine's; raises PipelineError where none works."""
    api = address()
    wrong = problem(api)
    if wrong:
        raise PipelineError(wrong)
    _use(api)


def use_running() -> None:
    """Use the server on this machine if one runs, to show the run; else Prefect starts its own.

    Raises PipelineError where one is configured and runs cannot use it.
    """
    api = address()
    if origin(api) or reachable(api):
        need()


@contextlib.contextmanager
def own_server() -> Iterator[None]:
    """Around Prefect's own server: raises PipelineError if it does not come up in time, or has no
    place for its records.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    try:
        if not settings.api.url and settings.server.ephemeral.enabled:
            _check_home(settings.home)
            _start()
        yield
    except RuntimeError as error:
        if "ephemeral Prefect API server" not in str(error):
            raise
        raise PipelineError(
            "Prefect's own server did not come up; start one in another terminal, prefect server"
            " start, or give it more time: PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=600"
        ) from error


def _check_home(home: Path) -> None:
    """Raise PipelineError where Prefect's folder cannot be written, as homes on many nodes."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise PipelineError(
            f"{home}: Prefect's server cannot keep its records there ({error.strerror}); export"
            " PREFECT_HOME=FOLDER names another place"
        ) from None


def _start() -> None:
    """Start Prefect's own server, deaf to Ctrl-C: a terminal sends it there too, and without the
    server a run that stops asks for minutes."""
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the process inherits it
    try:
        server.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    signal.signal(signal.SIGTERM, functools.partial(_end_with, server.stop))


def _end_with(stop: Callable[[], None], number: int, frame: Any) -> None:
    """End by a signal that Python does not clean up after, as it would, but not before `stop`."""
    stop()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _use(api: str) -> None:
    """Make this process, and those that it starts, talk to one server."""
    from prefect.context import refresh_global_settings_context

    os.environ["PREFECT_API_URL"] = api
    refresh_global_settings_context()
