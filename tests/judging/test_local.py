"""A local model as judge: its odds are those of the words that its reply would begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualign.core.errors import ModelError
from dualign.core.schema import user
from dualign.judging.local import LocalModel
from dualign.judging.questions import HARM, PREFERENCE, TRUTH, Ask, Harm, Preference, Truth, about
from dualign.lm.models import build_scratch, load_tokenizer, save
from dualign.params.base import Resources
from dualign.params.judging import LocalJudge
from dualign.params.loading import load_resources
from tests.lm.layouts import CHATS, byte_level
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
SHAPE = TINY.model_copy(update={"vocab_size": 600, "context": 4096})
ASKS = {
    HARM: [Ask(HARM, about(HARM, user("Hi"), answer=text)) for text in ("tea", "poison " * 20)],
    TRUTH: [Ask(TRUTH, about(TRUTH, user("Hi"), answer=text)) for text in ("tea", "poison " * 20)],
    PREFERENCE: [
        Ask(PREFERENCE, about(PREFERENCE, user("Hi"), answer_A=a, answer_B=b))
        for a, b in (("tea", "poison " * 9), ("poison " * 9, "tea"))
    ],
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def resources() -> Resources:
    changes = {"device": "cpu", "precision": "fp32", "scoring_batch_size": 2}
    return load_resources(ROOT / "params.yaml").model_copy(update=changes)


@pytest.mark.parametrize("question", [HARM, TRUTH, PREFERENCE], ids=lambda one: str(one.name))
@pytest.mark.parametrize("chat", ["chatml", "llama3"])
def test_odds_are_those_of_the_next_token(
    tmp_path: Path, resources: Resources, question: object, chat: str
) -> None:
    tokenizer = byte_level(CHATS[chat])
    model = build_scratch(SHAPE, tokenizer, 1).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    save(model, tokenizer, tmp_path / "judge")
    tokenizer = load_tokenizer(tmp_path / "judge")  # in which the date of a template is pinned
    spec = LocalJudge(kind="local", question=question.name, path=str(tmp_path / "judge"))  # type: ignore[attr-defined]
    replies = LocalModel(spec, resources)(ASKS[question])  # type: ignore[index]
    for ask, reply in zip(ASKS[question], replies, strict=True):  # type: ignore[index]
        turns = [{"role": "user", "content": ask.text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        odds = log_probability(model, tokenizer, text, ask.question.begin, ask.question.yes)
        odds -= log_probability(model, tokenizer, text, ask.question.begin, ask.question.no)
        assert reply.odds == pytest.approx(odds, abs=1e-3)
        if question is HARM:
            assert reply.verdict == Harm(unsafe=odds > 0, category=None)
        elif question is TRUTH:
            assert reply.verdict == Truth(truthful=odds > 0)
        else:
            assert reply.verdict == Preference(winner="A" if odds > 0 else "B")


def log_probability(model, tokenizer, text: str, begin: str, word: str) -> float:  # type: ignore[no-untyped-def]
    """log P of the first token of a word after a reply's beginning."""
    bare = tokenizer(text + begin, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text + begin + word, add_special_tokens=False)["input_ids"]
    shared = next(i for i, (a, b) in enumerate(zip([*bare, -1], whole, strict=False)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([whole[:shared]])).logits[0, -1].double()
    return float(torch.log_softmax(logits, 0)[whole[shared]])


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, resources: Resources) -> None:
    spec = LocalJudge(kind="local", question="harm", path=str(tmp_path / "nobody"))
    with pytest.raises(ModelError, match="nobody"):
        LocalModel(spec, resources)
