"""What is pushed needs no other folder, whatever stage made the policy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, GenerationConfig

from dualign.certify.certificate import Certificate
from dualign.certify.evidence import files
from dualign.certify.requirement import Requirement
from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DataError, DualignError
from dualign.core.records import Certified, Comparison, Provenance, as_row
from dualign.data import world
from dualign.lm import models
from dualign.lm.card import HEAD
from dualign.lm.decoding import beside
from dualign.params.base import LoraParams, Resources
from dualign.params.data import PrepareParams, SourceSpec
from dualign.params.loading import load, load_resources
from dualign.params.models import SftParams
from dualign.params.report import ReportParams
from dualign.publishing import card, command
from dualign.publishing.card import Published, policy_card, published
from dualign.publishing.push import push
from dualign.report.comparison import compare
from tests.report.conftest import certify, write_run
from tests.tiny import WIDER

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [answer.text for prompt in world.prompts()[::500] for answer in world.answers(prompt)]
SCRATCH = WIDER.model_copy(update={"vocab_size": 320, "layers": 2, "heads": 4, "context": 64})
LORA = LoraParams(rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear", quantise=None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models/sft and an adapter on it, as training stages leave them: without
    a card.
    """
    monkeypatch.chdir(tmp_path)
    resources: Resources = load_resources(ROOT / "params.yaml")
    tokenizer = models.train_tokenizer(TEXTS, 320)
    models.save(models.build_scratch(SCRATCH, tokenizer, 0), tokenizer, tmp_path / "models/sft")
    model = models.with_lora(models.load_policy("models/sft", resources), LORA, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    models.save(model, tokenizer, tmp_path / "models/reward_dpo/one")
    return tmp_path


def policy(root: Path, folder: str) -> Published:
    params = ROOT / "params.yaml"
    data = load(PrepareParams, params)
    base = load(SftParams, params)
    compared = load(ReportParams, params)
    return Published(root, folder, None, None, None, None, None, compared, data, base)


def test_the_reference_has_a_card_although_its_stage_wrote_none(run: Path) -> None:
    push(policy(run, "sft"), f"file://{run}/out")
    made = ModelCard.load(run / "out/README.md")
    assert "# sft" in made.text and made.data.tags == ["dualign", "dpo", "safety"]
    assert made.data.library_name == "transformers" and "## How to load" in made.text


def test_an_adapter_of_this_run_is_pushed_whole_or_on_a_base_that_others_have(run: Path) -> None:
    one = policy(run, "reward_dpo/one")
    for file in (run / "models/reward_dpo/one").iterdir():
        file.chmod(0o444)  # as DVC leaves them; only root can write over a copy of that mode
    push(one, f"file://{run}/whole")
    made = ModelCard.load(run / "whole/README.md")
    assert "# reward_dpo/one" in made.text and "More Information Needed" not in made.text
    assert "by its `generation_config.json`: `vllm serve whole`." in made.text
    assert not (run / "whole/adapter").exists(), "it is on a base that nobody else has"
    base, whole = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (run / "models/sft", run / "whole")
    )
    assert base.keys() == whole.keys()
    assert any(not torch.equal(base[name], whole[name]) for name in base)
    push(one, f"file://{run}/adapter", "owner/sft")
    config = read_json(run / "adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == "owner/sft"
    assert all(file.stat().st_mode & 0o200 for file in (run / "adapter").iterdir())
    made = ModelCard.load(run / "adapter/README.md")
    assert made.data.base_model == "owner/sft", "what the hub takes for its base"
    served = "vllm serve owner/sft --generation-config vllm --enable-lora --max-lora-rank 8"
    assert f"{served} --lora-modules policy=adapter" in made.text, "of rank 4; else for 16 alone"
    assert "serves it as it is" not in made.text and "gguf" not in made.text


@pytest.mark.parametrize("adapter", [(), ("--adapter", "--base", "owner/sft")])
def test_the_card_that_is_printed_is_the_one_that_is_pushed(
    run: Path,
    adapter: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(card, "published", policy)
    asked = ["reward_dpo/one", "--to", f"file://{run}/out", *adapter]
    assert command.main([*asked, "--card"]) == 0
    printed = capsys.readouterr().out
    assert command.main(asked) == 0
    assert (run / "out/README.md").read_text() == printed
    assert 'from_pretrained("out")' in printed


def test_the_card_is_about_the_data_of_the_run_not_of_params_that_were_changed_since(
    run: Path,
) -> None:
    """Of other data the licence would be another one."""
    write_comparison(run)
    source = {"format": "pku", "path": "PKU-Alignment/PKU-SafeRLHF-30K"}
    data = load(PrepareParams, ROOT / "params.yaml").model_dump(mode="json")
    base = load(SftParams, ROOT / "params.yaml").model_dump(mode="json")
    ran = {"prepare": data | {"safety": [source]}, "sft": base | {"base": "owner/base"}}
    ran["report"] = load(ReportParams, ROOT / "params.yaml").model_dump(mode="json")
    for stage, params in ran.items():
        write_provenance(run, stage, params)
    shutil.copy(ROOT / "params.yaml", run)  # of the world, and from scratch
    made = policy_card(published(run, "sft"), "owner/it")
    assert made.data.license == "cc-by-nc-4.0" and made.data.base_model == "owner/base"
    assert "PKU-SafeRLHF-30K (format `pku`): cc-by-nc-4.0." in made.text
    write_provenance(run, "prepare", {})
    with pytest.raises(DataError, match=r"provenance/prepare\.json: params: .*force prepare"):
        published(run, "sft")


def test_a_policy_is_loaded_to_draw_as_it_was_measured_whatever_its_base_draws_by(
    run: Path,
) -> None:
    """What Qwen2.5-0.5B-Instruct and its relatives have in their generation_config.json."""
    own = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    config = run / "models/sft/generation_config.json"
    write_json(config, read_json(config) | own | {"do_sample": True})
    push(policy(run, "reward_dpo/one"), f"file://{run}/out")
    kept = GenerationConfig.from_pretrained(run / "out")
    assert kept.do_sample and kept.top_k == 0 and not beside(kept)
    call = (run / "out/README.md").read_text().partition("policy.generate(**ids, ")[2]
    assert call.startswith(
        "do_sample=True, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new"
    )


def test_a_card_of_an_adapter_that_is_not_there_is_refused_as_its_push_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, "published", policy)
    asked = ["sft", "--to", f"file://{run}/out", "--adapter", "--base", "owner/sft"]
    for given in (asked, [*asked, "--card"]):
        assert command.main(given) == 2
        assert "models/sft: has no adapter (rank 0 trains" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["{run}/private/llama", "/srv/gone/llama", "../gone/llama"])
def test_a_card_names_no_place_of_this_machine(run: Path, base: str) -> None:
    base = base.format(run=run)
    shutil.copytree(run / "models/sft", run / "private/llama")
    ours = policy(run, "sft")
    rows = SourceSpec(format="pku", path=f"{run}/private/rows.jsonl")
    made = policy_card(
        replace(
            ours,
            base=ours.base.model_copy(update={"base": base}),
            data=ours.data.model_copy(update={"safety": [rows]}),
        ),
        "owner/it",
    )
    assert "Base: llama; its own" in made.text and "- rows.jsonl (format `pku`)" in made.text
    assert made.data.base_model is None, "which the hub takes ids for"
    assert not any(place in str(made) for place in (str(run), "/srv", "../"))


def test_the_certificate_is_the_one_that_came_with_the_policy(run: Path) -> None:
    """The page's may be of before, or without a row that params no longer name."""
    write_comparison(run)
    for stage, params in (("prepare", PrepareParams), ("sft", SftParams), ("report", ReportParams)):
        write_provenance(run, stage, load(params, ROOT / "params.yaml").model_dump(mode="json"))
    shutil.copytree(run / "models/sft", run / "models/certified/strict")
    (run / "models/certified/strict/README.md").write_text(f"{HEAD}\n# strict\n")
    found = Certified(
        returned="strict", statement="Kept", delta=0.05, max_new_tokens=9, requirements=[],
        candidates=[], tests=[],
    )  # fmt: skip
    write_json(run / "reports/metrics/certify/strict.json", as_row(found))
    assert "Kept. Such a test" in policy_card(published(run, "certified/strict"), "o/it").text
    assert "None: this policy was not tested" in policy_card(published(run, "sft"), "o/it").text
    card_of = policy_card(published(run, "certified/strict"), "o/it").text
    assert "do_sample=True, temperature=1.0, top_p=1.0" in card_of
    for how, said, call in (
        (
            {"temperature": 0.7, "top_p": 0.9},
            "drawn at temperature 0.7 and top_p 0.9",
            "temperature=0.7",
        ),
        ({"temperature": 0.0}, "drawn greedily", "**ids, do_sample=False, rep"),
    ):
        write_json(run / "reports/metrics/certify/strict.json", as_row(found) | how)
        card_of = policy_card(published(run, "certified/strict"), "o/it").text
        assert f"answers that are not {said} are outside of what was certified" in card_of
        assert call in card_of
    write_json(run / "reports/metrics/certify/strict.json", as_row(found))
    issued = certificate_of("strict", files(run / "models/certified/strict"))
    write_json(run / "reports/certificate/strict/certificate.json", issued.model_dump())
    assert published(run, "certified/strict").certificate == found
    (run / "models/certified/strict/config.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"not the one certified: config\.json was changed; run certify"
    ):
        published(run, "certified/strict")


def certificate_of(name: str, weights: dict[str, str]) -> Certificate:
    """A certificate of one policy with these files."""
    limit = Requirement(name="c", quantity="cost", limit=0.0, method="clustered_t")
    none: dict[str, Any] = {
        key: {} for key in ("ended", "tables", "labels", "sampling_seeds", "versions")
    }
    none |= dict.fromkeys(("plan", "prompts", "limits", "policy", "cost_model"))
    return Certificate(
        delta=0.05, seed=0, max_new_tokens=9, requirements=(limit,), candidates=(name,),
        tested=(), certified=(name,), returned=name, samples_per_prompt=1, same=(),
        weights={name: weights}, **none,
    )  # fmt: skip


def test_a_reference_certified_as_it_is_was_measured_once_and_either_folder_says_so(
    run: Path,
) -> None:
    write_run(run)
    params = certify(run, [-0.3], fallback="sft")
    compared = compare(run, params.model_copy(update={"policies": {"sft": "sft"}}))
    write_json(run / "reports/comparison.json", as_row(compared))
    for stage, of in (("prepare", PrepareParams), ("sft", SftParams), ("report", ReportParams)):
        write_provenance(run, stage, load(of, ROOT / "params.yaml").model_dump(mode="json"))
    shutil.copytree(run / "models/sft", run / "models/certified/dualign")
    (run / "models/certified/dualign/README.md").write_text(f"{HEAD}\n# sft\n")
    issued = policy_card(published(run, "certified/dualign"), "o/it").text
    assert "not among `evaluate.policies`" not in issued and "held-out prompts, " in issued
    trained = policy_card(published(run, "sft"), "o/it").text
    assert "This policy was certified, as models/certified/dualign," in trained
    assert "None: " in policy_card(published(run, "reward_dpo/one"), "o/it").text


def test_a_merge_is_not_said_to_be_trained_for_what_it_stands_for(tmp_path: Path) -> None:
    write_run(tmp_path)
    params = certify(tmp_path, [-0.6, -0.3])
    folders = {"certified": "certified/dualign", "dualign": "aligned/dualign"}
    rows = compare(tmp_path, params.model_copy(update={"policies": folders})).policies
    merged = "A merge of weight 1.5, to first order that for: "
    for name, said in (("certified", merged), ("dualign", "")):
        (tmp_path / "models" / folders[name]).mkdir(parents=True)
        (tmp_path / "models" / folders[name] / "README.md").write_text(f"{HEAD}\n# it\n")
        about = replace(policy(tmp_path, folders[name]), row=rows[name])
        nominal = f"less {rows[name].lam:.4g} times the cost (the nominal multiplier"
        assert f"## Objective\n\n{said}Reward, {nominal}" in policy_card(about, "o/it").text


@pytest.mark.parametrize("priced", [False, True])
def test_the_objective_has_prices_of_other_limits_where_the_training_took_them(
    tmp_path: Path, priced: bool
) -> None:
    params = write_run(tmp_path)
    alone = params.model_copy(update={"policies": {"dualign": "aligned/dualign"}})
    [row] = compare(tmp_path, alone).policies.values()
    (tmp_path / "models/aligned/dualign").mkdir(parents=True)
    (tmp_path / "models/aligned/dualign/README.md").write_text(f"{HEAD}\n# it\n")
    told = row.model_copy(update={"priced": priced, "additional": {"short": None}})
    text = policy_card(replace(policy(tmp_path, "aligned/dualign"), row=told), "o/it").text
    assert ("and the prices of its other limits" in text) == priced


def write_comparison(root: Path) -> None:
    """A report of no policy."""
    compared = Comparison(
        reference="sft", confidence=0.95, limit=0.0, recommended=None, nearest=None, missing=[],
        uncertified=[], certificates={}, params={}, policies={},
    )  # fmt: skip
    write_json(root / "reports/comparison.json", as_row(compared))


def write_provenance(root: Path, stage: str, params: dict[str, Any]) -> None:
    ran = Provenance(
        stage=stage, item=None, params=params, versions={}, seconds=1.0, peak_rss_mib=1.0,
        throughput={},
    )  # fmt: skip
    write_json(root / f"reports/provenance/{stage}.json", as_row(ran))


class Hub(BaseHTTPRequestHandler):
    """A hub that answers what it is told, and counts what it is asked. `held` are the files of its
    repository, `commits` the lines of those that were made, `mode` the way of uploads."""

    status = 200
    mode = "regular"
    said: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[list[str]] = []
    held: ClassVar[list[str]] = []
    commits: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.held]
        self.say(json.dumps(tree if "/tree/" in self.path else self.said).encode())

    def say(self, body: bytes) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": self.mode, "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.say(json.dumps({"files": files}).encode())
            return
        if "/commit/" in self.path:
            type(self).commits += map(json.loads, body.splitlines())
        self.do_GET()

    def log_message(self, *told: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, which the client is led to."""
    Hub.status, Hub.said, Hub.asked, Hub.held, Hub.commits = 200, {}, [], [], []
    Hub.mode = "regular"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, r"; `hf auth login` as one"),
        (403, r"; `hf auth login` as one .*; or name an owner of yours"),
        (404, r"; correct --to owner/name"),
        (500, r"; look after the network"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_remedy_before_weights_are_loaded(
    run: Path, hub: type[Hub], status: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status = status
    hub.said = {"error": "not so"}
    shutil.rmtree(run / "models/sft")  # without which weights would be missed
    with pytest.raises(DataError, match=rf"^owner/sft: cannot be pushed \(.*\){remedy}") as told:
        push(policy(run, "reward_dpo/one"), "owner/sft")
    assert len(str(told.value).splitlines()) == 1


def test_nothing_private_goes_to_a_repository_that_is_public(run: Path, hub: type[Hub]) -> None:
    """The hub leaves one that is there as it is, whatever is asked for."""
    hub.said = {
        "url": "https://huggingface.co/owner/sft",
        "id": "owner/sft",
        "private": False,
        "tags": [],
    }
    with pytest.raises(DataError, match=r"^owner/sft: is there and public; make it private"):
        push(policy(run, "sft"), "owner/sft", private=True)
    assert not any("commit" in path or "upload" in path for path in hub.asked)


def test_what_another_policy_left_in_a_repository_goes_with_its_weights(
    run: Path, hub: type[Hub]
) -> None:
    """Transformers loads `model.safetensors` of before in place of the card's own shards."""
    kept = ["README.md", "config.json", ".gitattributes", "chart.png", "policy.gguf", "own.json"]
    gone = ["model.safetensors.index.json", "pytorch_model.bin", "component-0/config.json"]
    gone += ["model-00001-of-00002.safetensors", "adapter/adapter_model.safetensors"]
    hub.said = {
        "url": "https://huggingface.co/owner/sft", "id": "owner/sft", "sha": "0" * 40, "tags": [],
        "private": False,
        "commitUrl": "https://huggingface.co/owner/sft/commit/1", "commitOid": "1",
        "success": True,
    }  # fmt: skip
    hub.held = [*kept, *gone]
    assert push(policy(run, "sft"), "owner/sft").endswith("/commit/1")
    deeds: dict[str, set[str]] = {}
    for line in hub.commits:
        deeds.setdefault(line["key"], set()).add(line["value"].get("path", ""))
    assert deeds["deletedFile"] == set(gone)
    assert {"README.md", "config.json", "model.safetensors"} <= deeds["file"]


def test_what_carries_large_files_fails_in_one_line(run: Path, hub: type[Hub]) -> None:
    """It raises RuntimeError, without a cause."""
    hub.mode = "lfs"
    hub.said = {
        "url": "https://huggingface.co/owner/sft", "id": "owner/sft", "sha": "0" * 40, "tags": [],
        "private": False, "casUrl": "nowhere", "accessToken": "t", "exp": 2**40,
    }  # fmt: skip
    with pytest.raises(DataError, match=r"^owner/sft: cannot be pushed \(.*URL.*\); look after"):
        push(policy(run, "sft"), "owner/sft")


def test_a_policy_that_cannot_be_staged_leaves_no_empty_repository(
    run: Path, hub: type[Hub]
) -> None:
    (run / "models/sft/model.safetensors").write_bytes(b"cut short")
    with pytest.raises(DualignError):
        push(policy(run, "reward_dpo/one"), "owner/it")
    assert hub.asked == ["/api/whoami-v2"]


def test_a_name_without_its_owner_is_refused_before_a_repository_is_made(
    run: Path, hub: type[Hub]
) -> None:
    with pytest.raises(DataError, match=r"^--to sft: neither owner/name .*; name the owner too"):
        push(policy(run, "sft"), "sft")
    assert not hub.asked


def test_a_hub_that_is_not_reached_is_told_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client raises errors of the network that are none of the system's."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^owner/sft: cannot be pushed \(.*\); unset HF_HUB_OFF"):
        push(policy(run, "sft"), "owner/sft")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(DataError, match=r"^owner/sft: cannot be pushed \(.*refused.*\); look"):
        push(policy(run, "sft"), "owner/sft")


def test_a_mistake_of_the_program_is_none_of_the_network(
    run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.said = {"url": 5}
    with pytest.raises((TypeError, AttributeError)):
        push(policy(run, "sft"), "owner/sft")


def test_a_refusal_does_not_wait_for_torch(tmp_path: Path) -> None:
    script = """
import sys
from dualign.publishing.command import main
status = main(["none", "--to", "owner/it"])
sys.exit(0 if status == 2 and "torch" not in sys.modules else 1)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"models/none: holds no policy" in done.stderr


def test_a_policy_whose_card_is_gone_is_told(run: Path) -> None:
    shutil.copytree(run / "models/sft", run / "models/aligned/one")
    with pytest.raises(DataError, match=r"aligned/one/README\.md: no such file; run the stage"):
        push(policy(run, "aligned/one"), f"file://{run}/out")


def test_a_scorer_is_no_policy(run: Path) -> None:
    """A card that loads it as one would give others a model without its head."""
    (run / "models/sft/scorer.json").write_text("{}")
    with pytest.raises(DataError, match="models/sft: holds no policy"):
        published(run, "sft")
