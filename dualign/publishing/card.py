"""The model card of a policy, in the hub's form: what it is, on what data, how safe, how it loads.

It begins with the card that the policy's own stage wrote (`README.md` in its folder), and adds what
only a finished run knows: the table of the evaluation, the certificate, and the licences of data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from pydantic import ValidationError

from dualign.certify.certificate import CERTIFICATES, FILE, read
from dualign.certify.evidence import check_files
from dualign.core.errors import DataError
from dualign.core.records import (
    AdapterConfig,
    Certified,
    ComparedPolicy,
    Comparison,
    Provenance,
    fault,
    read_optional_record,
    read_record,
)
from dualign.core.units import decoding_in_words
from dualign.evaluation.measures import MEASURES
from dualign.lm.card import HEAD
from dualign.lm.engines.ranks import room_for
from dualign.lm.folders import MIXTURE, SCORER, adapter_in, is_policy
from dualign.params.base import StageParams
from dualign.params.data import PrepareParams, SourceSpec
from dualign.params.models import SftParams
from dualign.params.report import ReportParams
from dualign.publishing.licences import NON_COMMERCIAL, licence_of, licence_of_base, together
from dualign.publishing.suites import interval, judged_suites
from dualign.report.comparison import certified_by

P = TypeVar("P", bound=StageParams)

#: Tells vLLM to draw as a request says, and otherwise from the policy itself, not as its base asks.
_PLAIN = "--generation-config vllm"

COMPARISON = Path("reports/comparison.json")
#: What the metadata and the table show of a policy, and what it is called.
_SHOWN = {measure.key: measure.card for measure in MEASURES if measure.card}


@dataclass(frozen=True)
class Published:
    """A policy of a finished run: its folder under models/, and what the run says of it.

    `name` is its row among `evaluate.policies`, None where it has none. `returned_by` is the row of
    `certify` that returned this policy, which `certificate` tells of the folder that it wrote."""

    root: Path
    folder: str
    name: str | None
    row: ComparedPolicy | None
    reference: ComparedPolicy | None
    certificate: Certified | None
    returned_by: str | None
    compared: ReportParams
    data: PrepareParams
    base: SftParams

    @property
    def sources(self) -> list[SourceSpec]:
        """Where its rows came from, each once."""
        every = [*self.data.sft, *self.data.helpful, *self.data.safety]
        return [source for i, source in enumerate(every) if source not in every[:i]]

    @property
    def base_id(self) -> str | None:
        """The hub id of its base; None for a base of this run's own or of a local folder, which may
        be gone."""
        base = self.base.base
        local = base == "scratch" or (self.root / base).exists() or not _may_be_id(base)
        return None if local else base

    @property
    def licence(self) -> str:
        """What its data and its base allow, by the hub's name."""
        folder = self.root / self.base.base
        return together(self.sources, licence_of_base(self.base.base, folder))


def _may_be_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def published(root: Path, folder: str) -> Published:
    """What a finished run in `root` says of the policy in models/FOLDER.

    Data, base and certificate are those of the stages that made it, whatever params.yaml names by
    now. Raises DualignError where there is no such policy, no report that compares it, or where it
    is not the one that its certificate is about.
    """
    policy = root / "models" / folder
    if not is_policy(policy) or (policy / SCORER).is_file():
        raise DataError(f"{policy}: holds no policy; `models/certified/NAME` is one only if one is")
    if not (root / COMPARISON).is_file():
        raise DataError(f"{root / COMPARISON}: is missing; run the stage report first")
    compared = read_record(root / COMPARISON, Comparison)
    kind, _, run = folder.partition("/")
    name = _evaluated(folder, compared)
    return Published(
        root,
        folder,
        name,
        compared.policies[name] if name else None,
        compared.policies.get(compared.reference),
        _certificate_of(root, policy, run) if kind == "certified" else None,
        certified_by(folder, compared.certificates),
        _ran_with(ReportParams, root),
        _ran_with(PrepareParams, root),
        _ran_with(SftParams, root),
    )


def _evaluated(folder: str, compared: Comparison) -> str | None:
    """The policy in a folder by the name that it was evaluated under; one that was certified as it
    is may have been evaluated where it was trained."""
    folders = {row.folder: name for name, row in compared.policies.items()}
    kind, _, run = folder.partition("/")
    alike = [
        name
        for trained, name in folders.items()
        if kind == "certified" and certified_by(trained, compared.certificates) == run
    ]
    return folders.get(folder) or next(iter(alike), None)


def _certificate_of(root: Path, policy: Path, run: str) -> Certified | None:
    """What `certify` said of the policy in a folder, whose files are those that it tested."""
    issued = root / CERTIFICATES / run / FILE
    if issued.is_file():
        found = read(issued)
        tested = found.weights.get(found.returned or "", {})
        try:
            check_files(policy, tested, f"the policy {found.returned!r}")
        except DataError as error:
            raise DataError(f"{error}; run certify again, or bring back its files") from error
    return read_optional_record(root / "reports/metrics/certify" / f"{run}.json", Certified)


def _ran_with(params: type[P], root: Path) -> P:
    """The params that a stage last ran with. Raises DualignError where its provenance has none."""
    path = root / "reports/provenance" / f"{params.section}.json"
    try:
        return params.model_validate(read_record(path, Provenance).params)
    except ValidationError as error:
        raise DataError(
            f"{path}: params: {fault(error)}; run the stage again (`dvc repro --force"
            f" {params.section}`)"
        ) from error


def policy_card(policy: Published, name: str, base: str | None = None) -> ModelCard:
    """The card; `name` is what the policy is called where it goes, `base` what its adapter, which
    goes alone, is on; None for whole weights. Raises DataError where it has no adapter.
    """
    own = ModelCard(_own_card(policy))
    parts = [
        own.text.strip(),
        _method(policy),
        _evaluation(policy),
        judged_suites(policy.root, policy.compared, policy.name) if policy.name else "",
        _certificate(policy),
        _data(policy),
        _limits(policy),
        _loading(policy, name, _served(policy, name, base)),
    ]
    data = metadata(policy, name, own.data.to_dict(), base)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def _own_card(policy: Published) -> str:
    """The card that dualign wrote into the policy's folder. Trainings write none, and PEFT's, which
    lies beside an adapter, is a form to be filled in. Raises DataError where it is gone.
    """
    if not policy.folder.startswith(("aligned/", "certified/")):
        return f"{HEAD}\n# {policy.folder}\n"
    path = policy.root / "models" / policy.folder / "README.md"
    if not path.is_file():
        raise DataError(f"{path}: no such file; run the stage that made the policy again")
    return path.read_text()


def metadata(
    policy: Published, name: str, own: Mapping[str, Any], base: str | None = None
) -> ModelCardData:
    """The card's head, by the hub's own class: what the stage's own card has, and what is added."""
    given = [source for source in policy.sources if source.format != "world"]
    licences = [licence_of(source) for source in given]
    datasets = [found.dataset for found in licences if found and found.named]
    return ModelCardData(
        model_name=name.rpartition("/")[2],
        **own,
        license=policy.licence,
        base_model=base or policy.base_id,
        datasets=list(dict.fromkeys(datasets)) or None,
        eval_results=_results(policy) or None,
    )


def _results(policy: Published) -> list[EvalResult]:
    if policy.row is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out-prompts",
            dataset_name="held-out prompts of the training data",
            metric_type=key,
            metric_name=text,
            metric_value=round(found.mean, 4),
        )
        for key, text in _SHOWN.items()
        if (found := getattr(policy.row, key)) is not None
    ]


def _method(policy: Published) -> str:
    """What it was trained for, where that is a tilt by reward and cost; what a merge stands for."""
    if policy.row is None or policy.row.lam is None or not policy.row.tilts:
        return ""
    others = ", and the prices of its other limits" if policy.row.priced else ""
    weight = policy.row.merge_weight
    merge = "" if weight is None else f"A merge of weight {weight:.4g}, to first order that for: "
    return (
        f"## Objective\n\n{merge}Reward, less {policy.row.lam:.4g} times the cost (the nominal"
        f" multiplier lambda), {policy.compared.beta:g} times the KL divergence to the reference"
        f" policy (beta){others}."
    )


def _evaluation(policy: Published) -> str:
    if policy.row is None:
        return (
            "## Evaluation\n\nThis policy is not among `evaluate.policies`: nothing was measured."
        )
    rows = [
        f"| {text} | {interval(found)} | {interval(getattr(policy.reference, key, None))} |"
        for key, text in _SHOWN.items()
        if (found := getattr(policy.row, key)) is not None
    ]
    head = (
        f"On {policy.row.prompts} held-out prompts, {policy.row.answers} answers;"
        f" {100 * policy.compared.confidence:g} % intervals, by prompt, each of one measure alone."
    )
    why = "Scores are those of learned models, not of people."
    table = ["| | this policy | reference |", "|---|---|---|", *rows]
    return "\n".join(["## Evaluation", "", f"{head} {why}", "", *table])


def _certificate(policy: Published) -> str:
    if policy.certificate is None and policy.returned_by:
        certified = f"models/certified/{policy.returned_by}"
        return (
            f"## Certificate\n\nThis policy was certified, as {certified}, whose card holds the"
            " certificate."
        )
    if policy.certificate is None:
        none = "## Certificate\n\nNone: this policy was not tested on prompts kept for that alone."
        if not policy.folder.startswith("aligned/"):
            return none
        return f"{none} Its expected cost was steered to the limit above by a cost model."
    return (
        f"## Certificate\n\n{policy.certificate.statement}. Such a test is wrong with"
        f" probability {policy.certificate.delta:g} at most, if its bound holds, and says"
        " nothing of prompts unlike those it was made on."
    )


def _data(policy: Published) -> str:
    lines = ["## Data and licences", ""]
    for source in policy.sources:
        licence = licence_of(source)
        name = _elsewhere(source.path or "the embedded world, which dualign generates")
        if licence is None:
            lines.append(f"- {name} (format `{source.format}`): licence not known here; check it.")
        else:
            whose = "" if licence.named else f", if these are {licence.dataset}'s rows; check it"
            lines.append(f"- {name} (format `{source.format}`): {licence.name}{whose}.")
    if policy.licence == NON_COMMERCIAL:
        lines += ["", "Data or base are for non-commercial use: so is this policy."]
    if policy.base.base == "scratch":
        lines += ["", "Base: a small model that the run built from scratch."]
    else:
        base = policy.base_id or _elsewhere(policy.base.base)
        lines += ["", f"Base: {base}; its own licence holds too."]
    return "\n".join(lines)


def _elsewhere(place: str) -> str:
    """What others are told of a place: of a path of this machine the last name alone."""
    path = Path(place)
    return path.name if path.is_absolute() or ".." in path.parts else place


def _limits(policy: Published) -> str:
    drawn = decoding_in_words(*decoding_of(policy)) or "drawn at temperature 1"
    known = "measured" if policy.certificate is None else "certified"
    return (
        "## Limits\n\nThe limit is on an *expected* cost by a learned cost model: single answers"
        " may"
        " be harmful, and more so where somebody tries. Prompts of another kind, another language,"
        f" a system prompt or answers that are not {drawn} are outside of what was {known}."
    )


def decoding_of(policy: Published) -> tuple[float, float]:
    """Temperature and top-p of what is known of the policy: those of its certificate, or 1."""
    found = policy.certificate
    return (1.0, 1.0) if found is None else (found.temperature, found.top_p)


def _loading(policy: Published, name: str, served: str) -> str:
    if (policy.root / "models" / policy.folder / MIXTURE).is_file():
        return "## How to load\n\nSee above: it is a mixture of policies."
    longest = 256 if policy.row is None else policy.row.max_new_tokens
    temperature, top_p = decoding_of(policy)
    drawn = f"do_sample=True, temperature={temperature}, top_p={top_p}, top_k=0"
    how = f"{drawn if temperature else 'do_sample=False'}, repetition_penalty=1.0"
    return f"""## How to load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
policy = AutoModelForCausalLM.from_pretrained("{name}")
chat = [{{"role": "user", "content": "..."}}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, \
return_tensors="pt", return_dict=True)
answer = policy.generate(**ids, {how}, max_new_tokens={longest})
```

{served}"""


def _served(policy: Published, name: str, base: str | None) -> str:
    if base is not None:
        temperature, top_p = decoding_of(policy)
        rank = room_for(_rank(policy.root / "models" / policy.folder))
        return (
            f"It is a LoRA adapter on `{base}`, which Transformers loads with it where `peft` is"
            f" installed. vLLM serves both: `vllm serve {base} {_PLAIN} --enable-lora"
            f" --max-lora-rank {rank} --lora-modules policy={name}`. Ask it for temperature"
            f" {temperature:g} and top_p {top_p:g}, as was measured: the base's own"
            " `generation_config.json` may say otherwise."
        )
    return (
        "For llama.cpp, in a clone of it, with a copy of this folder:\n`python"
        " convert_hf_to_gguf.py FOLDER --outfile policy.gguf`. vLLM serves it as it is, and draws"
        f" as it was measured, by its `generation_config.json`: `vllm serve {name}`."
    )


def _rank(policy: Path) -> int:
    """The rank of a policy's adapter."""
    config = adapter_in(policy) / "adapter_config.json"
    if not config.is_file():
        raise DataError(f"{policy}: has no adapter (rank 0 trains all weights); push it whole")
    return read_record(config, AdapterConfig).r
