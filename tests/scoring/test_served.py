"""Classifiers and guards whose weights vLLM holds: what it says, and what is said where it does
not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.servers import Handler, Server
from dualign.core.errors import ModelError, ParamsError
from dualign.core.schema import user
from dualign.data import world
from dualign.params.base import Resources
from dualign.params.models import GivenScorer
from dualign.scoring.given import load_given
from dualign.scoring.scorers import Scorer
from tests.scoring.conftest import TEXTS, Maker
from tests.vllm import has_vllm, serving

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [user(question) for question in world.prompts()[:3]] * 3
ANSWERS = TEXTS[:9]
ENDED = [True, False] * 4 + [True]


def scored(scorer: Scorer) -> np.ndarray:
    return scorer.score(PROMPTS, ANSWERS, batch_size=4, ended=ENDED)


def load(spec: GivenScorer, resources: Resources) -> Scorer:
    return load_given([spec], "harmful", 0.0, resources)


# --- vLLM -----------------------------------------------------------------------------------------


@has_vllm
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "labels"])
def test_a_server_scores_as_the_weights_do_and_so_does_what_was_saved(
    kind: str, classifier: Maker, labels: Maker, resources: Resources, tmp_path: Path
) -> None:
    """Answers that were cut too."""
    multiple = kind == "labels"
    spec = labels("single_label_classification", "toxic") if multiple else classifier()
    here = scored(load(spec, resources))
    assert here.std() > 0.1
    with serving(Path(spec.path), tmp_path / "log", "--runner", "pooling") as url:
        scorer = load(spec.model_copy(update={"url": url}), resources)
        assert scored(scorer) == pytest.approx(here, abs=1e-4)
        scorer.save(tmp_path / "saved")
        assert not list((tmp_path / "saved").rglob("*.safetensors"))
        assert scored(Scorer.load(tmp_path / "saved", resources)) == pytest.approx(here, abs=1e-4)
    with pytest.raises(ModelError, match="is `vllm serve --runner pooling` up"):
        scored(scorer)


@has_vllm
@pytest.mark.slow
def test_a_guard_at_a_server_scores_as_here(
    guard: Maker, resources: Resources, tmp_path: Path
) -> None:
    """Of several words and a prefix, too; a row that its context does not hold is not cut in
    silence.
    """
    spec = guard()
    several = guard(unsafe=["unsafe", "no"], safe=["safe"], prefix=" So")
    here, of_several = (scored(load(each, resources)) for each in (spec, several))
    assert here.std() > 0.1 and of_several.std() > 0.1
    with serving(Path(spec.path), tmp_path / "log") as url:
        scorer = load(spec.model_copy(update={"url": url}), resources)
        assert scored(scorer) == pytest.approx(here, abs=1e-4)
        other = load(several.model_copy(update={"url": url}), resources)
        assert scored(other) == pytest.approx(of_several, abs=1e-4)
        scorer.save(tmp_path / "saved")
        assert not list((tmp_path / "saved").rglob("*.safetensors"))
        assert scored(Scorer.load(tmp_path / "saved", resources)) == pytest.approx(here, abs=1e-4)
        with pytest.raises(ModelError, match="start it with a larger --max-model-len"):
            scorer.score(PROMPTS[:1], [" ".join(ANSWERS)], batch_size=1)
    with pytest.raises(ModelError, match="is `vllm serve` up"):
        scored(scorer)


# --- what is no such server -----------------------------------------------------------------------


@contextmanager
def answering(root: str, answer: Any) -> Iterator[str]:
    """A server that holds `root` and gives one answer to every question."""

    class Asked(Handler):
        def do_GET(self) -> None:
            self._tell({"object": "list", "data": [{"id": "m", "object": "model", "root": root}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._tell(answer)

        def _tell(self, content: Any) -> None:
            self.say(json.dumps(content).encode())

    with Server(Asked) as server:
        yield server.url


def refused(spec: GivenScorer, resources: Resources, answer: Any, message: str) -> None:
    """Scoring at a server that says so ends with the message."""
    with answering(spec.path, answer) as url:
        scorer = load(spec.model_copy(update={"url": url}), resources)
        with pytest.raises(ModelError, match=message):
            scored(scorer)


def test_a_server_of_another_model_is_refused(classifier: Maker, resources: Resources) -> None:
    spec = classifier()
    with answering("/another", {}) as url, pytest.raises(ParamsError) as error:
        load(spec.model_copy(update={"url": url}), resources)
    assert f"it serves /another, the scorer is {spec.path}" in str(error.value)
    assert "set url to null" in str(error.value)


def test_where_nothing_answers_that_is_said(
    classifier: Maker, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with answering("/another", {}) as url:
        """Its port is free afterwards."""
    with pytest.raises(ModelError, match="is `vllm serve --runner pooling` up"):
        load(classifier().model_copy(update={"url": url}), resources)


ROW = {"index": 0, "label": "LABEL_0", "probs": [0.5], "num_classes": 1}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"object": "error"}, "its answer is none of vLLM's"),
        ({"data": [{"index": 0, "embedding": [0.5]}]}, "its answer is none of vLLM's"),
        ({"data": [ROW]}, "it gives 1 rows for 4, or other than 1 outputs"),
        ({"data": [ROW | {"index": i, "probs": [1.0, 2.0]} for i in range(4)]}, "other than 1 out"),
    ],
)
def test_an_answer_of_another_kind_is_refused(
    classifier: Maker, resources: Resources, answer: Any, message: str
) -> None:
    refused(classifier(), resources, answer, message)


def test_probabilities_are_no_logits(labels: Maker, resources: Resources) -> None:
    spec = labels("single_label_classification", "toxic")
    names = json.loads((Path(spec.path) / "config.json").read_text())["id2label"]
    shares = [1 / len(names)] * len(names)
    answer = {"data": [{"index": i, "probs": shares} for i in range(4)]}
    refused(spec, resources, answer, "it gives probabilities, where logits were asked for")


def test_rows_come_in_the_order_that_they_say(classifier: Maker, resources: Resources) -> None:
    """A batch begins with its longest row."""
    spec = classifier()
    rows = [{"index": i, "probs": [float(i)]} for i in (3, 1, 0, 2)]
    answers = ["No.", "No, it is not safe.", "No, it is not safe, and I will not.", "No, not safe."]
    with answering(spec.path, {"data": rows}) as url:
        scorer = load(spec.model_copy(update={"url": url}), resources)
        scores = scorer.score(PROMPTS[:1] * 4, answers, batch_size=4)
    assert scores.tolist() == [3, 1, 0, 2]


SCORE = {"index": 0, "object": "score", "score": 0.5}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"object": "error"}, "its answer is none of vLLM's"),
        ({"data": [SCORE] * 4}, "its answer is none of vLLM's"),
        ({"data": [SCORE], "usage": {"prompt_tokens": 9}}, "its answer is none of vLLM's"),
        ({"data": [SCORE | {"score": 2}] * 4, "usage": {"prompt_tokens": 9}}, "none of vLLM's"),
        ({"data": [SCORE] * 4, "usage": {"prompt_tokens": 9}}, "it reads 9 of"),
    ],
)
def test_what_a_guards_server_says_is_read_strictly(
    guard: Maker, resources: Resources, answer: Any, message: str
) -> None:
    refused(guard(), resources, answer, message)


@pytest.mark.parametrize("url", ["localhost:8000", "http://me:key@host/v1", "http://host/v1?key=1"])
def test_an_address_is_one(url: str) -> None:
    with pytest.raises(ValueError, match="an address is http"):
        GivenScorer(path="p", kind="classifier", higher_is="harmful", url=url)


def test_a_score_model_of_safe_rlhf_is_not_served() -> None:
    with pytest.raises(ValueError, match="a server scores by kind classifier, labels or guard"):
        GivenScorer(path="p", kind="safe_rlhf", higher_is="harmful", url="http://host/v1")
