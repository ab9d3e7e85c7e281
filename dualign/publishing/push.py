"""A policy's folder with its full model card, pushed to the hub or into a folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the library that it speaks HTTP by
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dualign.core.artifacts import copy_folder, replacing
from dualign.core.errors import DataError
from dualign.lm.folders import ADAPTER, MIXTURE, adapter_in
from dualign.publishing.card import Published, decoding_of, policy_card

FOLDER = "file://"
#: What a policy that was pushed before may have left at the hub, and would be loaded for this one:
#: weights in one file beside others in shards, an adapter, a mixture, another tokenizer.
_OF_A_POLICY = [
    *("*.safetensors", "*.safetensors.index.json", "mixture.json"),
    "*pytorch_model*.bin*",
    *("*config.json", "*chat_template.jinja", "*tokenizer.json", "*tokenizer.model"),
    *("*special_tokens_map.json", "*added_tokens.json", "*vocab.json", "*merges.txt"),
]
#: What the hub's client raises of the hub and of the network.
_OF_HUB = (HTTPError, OSError)
_LOG_IN = "`hf auth login` as one who may write there, or put such a token into HF_TOKEN"
#: What to do about a status of the hub; about all else, look after the network.
_REMEDIES = {
    400: "correct --to owner/name",
    401: _LOG_IN,
    403: f"{_LOG_IN}; or name an owner of yours",
    404: f"correct --to owner/name, or {_LOG_IN}",
    409: "somebody else wrote there meanwhile; push again",
    413: "it is more than the hub takes",
    429: "the hub asks for a pause; push again in some minutes",
}


def name_at(to: str) -> str:
    """What a policy is called at the target of a push: `owner/name`, or its folder's name."""
    return Path(to.removeprefix(FOLDER)).name if to.startswith(FOLDER) else to


def _check_target(to: str) -> None:
    """Raise DataError where a target is neither a new folder nor a name on the hub."""
    if to.startswith(FOLDER):
        out = Path(to.removeprefix(FOLDER))
        if out.exists():
            raise DataError(f"{out}: exists already; name a new folder")
        return
    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise DataError(f"--to {to}: neither owner/name nor file://FOLDER ({error})") from error
    if "/" not in to:
        raise DataError(f"--to {to}: neither owner/name nor file://FOLDER; name the owner too")


def staged(policy: Published, card: str, out: Path, base: str | None) -> None:
    """Write to a new folder `out` what is pushed: policy or adapter on `base`, and the card."""
    source = policy.root / "models" / policy.folder
    if base is None:
        from dualign.lm.decoding import rewrite  # torch, which a refusal need not wait for
        from dualign.lm.publish import publish

        publish(source, out)
        shutil.rmtree(out / ADAPTER, ignore_errors=True)  # on a base that nobody else calls so
        if not (out / MIXTURE).is_file():
            rewrite(out, *decoding_of(policy))
    else:
        copy_folder(adapter_in(source), out)
        config = out / "adapter_config.json"
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | {"base_model_name_or_path": base}, indent=2))
    (out / "README.md").write_text(card)


def push(policy: Published, to: str, base: str | None = None, *, private: bool = False) -> str:
    """Push to `owner/name` or to `file://FOLDER`; returns where it lies.

    Raises DataError, before anything is loaded, where the target is no such name or exists already
    as a folder, where there is no adapter, or the hub does not know who asks; and where it refuses.
    """
    _check_target(to)
    card = str(policy_card(policy, name_at(to), base))
    if not to.startswith(FOLDER):
        return _to_hub(policy, card, to, base, private)
    out = Path(to.removeprefix(FOLDER))
    with replacing(out) as temporary:
        staged(policy, card, temporary, base)
    return str(out)


def _to_hub(policy: Published, card: str, to: str, base: str | None, private: bool) -> str:
    hub = HfApi()
    with _refusals(to):
        hub.whoami()
    with tempfile.TemporaryDirectory(prefix="dualign-push-") as folder:
        out = Path(folder) / "policy"
        staged(policy, card, out, base)
        with _refusals(to):
            hub.create_repo(to, private=private, exist_ok=True)
            if private and not hub.model_info(to).private:
                raise DataError(f"{to}: is there and public; make it private in its settings first")
            done = hub.upload_folder(
                repo_id=to, folder_path=out, commit_message="A policy by dualign",
                delete_patterns=_OF_A_POLICY,
            )  # fmt: skip
    return str(done.commit_url)


@contextlib.contextmanager
def _refusals(to: str) -> Iterator[None]:
    """Tell what the hub refuses, or the network does not carry, with the remedy."""
    try:
        yield
    except (*_OF_HUB, RuntimeError) as error:
        # RuntimeError is of one file of many, or of what carries large ones, which has no cause
        told = error.__cause__ if isinstance(error, RuntimeError) else error
        cause = told if isinstance(told, _OF_HUB) else error
        raise DataError(f"{to}: cannot be pushed ({_reason(cause)}); {_remedy(cause)}") from error


def _reason(error: BaseException) -> str:
    told = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    return str(told).splitlines()[0]


def _remedy(error: BaseException) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return _LOG_IN
    if isinstance(error, OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    return _REMEDIES.get(status, "look after the network, and push again")


def base_of_adapter(policy: Published, named: str | None) -> str:
    """The base that an adapter names, or `named`. Raises DataError where only this run has it."""
    if named:
        return named
    if policy.base.train or policy.base_id is None:
        raise DataError(
            "--adapter: its base is models/sft of this run, which nobody else has; push sft first"
            " and name it by --base owner/name"
        )
    return policy.base_id
