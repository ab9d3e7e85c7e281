"""Given scorers of every kind against brute force: what they read, what the score is, and what
comes back from disk.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    FNetConfig,
    FNetForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
)

from dualign.core.errors import DualignError, ModelError, ParamsError
from dualign.core.schema import Message, user
from dualign.data import world
from dualign.lm.folders import SCORER
from dualign.lm.models import load_tokenizer
from dualign.params import loading
from dualign.params.base import Resources
from dualign.params.models import GivenScorer, ScorerKind
from dualign.scoring.calibration import Isotonic, Platt
from dualign.scoring.given import load_given
from dualign.scoring.kinds import KINDS
from dualign.scoring.scorers import Scorer
from tests.lm.architectures import LOSING, built
from tests.scoring.conftest import ROOT, SIZES, TEXTS, Maker, shaken
from tests.tiny import on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = world.prompts()[0]
PROMPTS: list[list[Message]] = [
    user(QUESTION),
    user("Why?"),
    [*user("Hm?"), {"role": "assistant", "content": "Yes."}, *user("Why?")],
] * 3
ANSWERS = TEXTS[:9]


def scored(spec: GivenScorer, resources: Resources, **more: Any) -> np.ndarray:
    scorer = load_given([spec], "harmful", 0.0, resources)
    return scorer.score(PROMPTS, ANSWERS, batch_size=4, **more)


def whole(tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Ids of each conversation, as the tokenizer's own template renders it."""
    turns = [
        [*prompt, {"role": "assistant", "content": a}]
        for prompt, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in turns]
    return [
        tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for text in texts
    ]


@torch.no_grad()
def logits(path: str) -> np.ndarray:
    """What the classifier itself says of each conversation alone, [rows, labels]."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    return np.array([model.eval()(input_ids=ids).logits[0].tolist() for ids in whole(tokenizer)])


# --- what each kind says --------------------------------------------------------------------------


def test_a_classifier_of_one_output_gives_its_logit(
    classifier: Maker, resources: Resources
) -> None:
    spec = classifier()
    scores = scored(spec, resources)
    assert scores == pytest.approx(logits(spec.path)[:, 0], abs=1e-5) and scores.std() > 0.1
    helpful = spec.model_copy(update={"higher_is": "helpful"})
    assert scored(helpful, resources) == pytest.approx(-scores)


def test_a_label_under_a_softmax_gives_its_log_odds(labels: Maker, resources: Resources) -> None:
    spec = labels("single_label_classification", "toxic")
    exp = np.exp(logits(spec.path))
    share = exp[:, 1] / exp.sum(1)
    assert scored(spec, resources) == pytest.approx(np.log(share / (1 - share)), abs=1e-4)


def test_a_label_under_a_sigmoid_gives_its_log_odds(labels: Maker, resources: Resources) -> None:
    spec = labels("multi_label_classification", "threat")
    share = 1 / (1 + np.exp(-logits(spec.path)[:, 2]))
    assert scored(spec, resources) == pytest.approx(np.log(share / (1 - share)), abs=1e-4)


def test_an_output_of_a_regression_is_the_score(labels: Maker, resources: Resources) -> None:
    """As of reward models that rate several attributes, each for itself."""
    spec = labels("regression", "threat")
    assert scored(spec, resources) == pytest.approx(logits(spec.path)[:, 2], abs=1e-5)


@torch.no_grad()
def beaver(spec: GivenScorer) -> np.ndarray:
    """Safe RLHF by hand: LlamaModel and head at the last token of its own text, rendered by its own
    rules.
    """
    tokenizer = AutoTokenizer.from_pretrained(spec.path)
    model = AutoModelForSequenceClassification.from_pretrained(spec.path, num_labels=1)
    weights = load_file(Path(spec.path) / "model.safetensors")
    backbone = LlamaModel(model.config).eval()
    backbone.load_state_dict(
        {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    )
    scores = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        text = "BEGINNING OF CONVERSATION: "
        for turn in prompt:
            own = turn["role"] == "user"
            text += (
                f"USER: {turn['content']} ASSISTANT:"
                if own
                else turn["content"] + tokenizer.eos_token
            )
        ids = tokenizer(text + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        hidden = backbone(input_ids=ids).last_hidden_state[0, -1]
        scores.append(float(weights["score_head.weight"][0] @ hidden))
    return np.array(scores)


def test_a_score_model_of_safe_rlhf_is_read_without_its_code(
    safe_rlhf: Maker, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    spec = safe_rlhf()
    scores = scored(spec, resources)
    assert "no chat template" not in caplog.text  # its layout is known
    assert scores == pytest.approx(beaver(spec), abs=1e-5) and scores.std() > 0.1


def test_the_bias_and_the_normaliser_of_safe_rlhf_are_kept(
    safe_rlhf: Maker, resources: Resources
) -> None:
    """A reward is shifted and scaled, a cost is scaled."""
    tensors = {
        "score_head.bias": torch.tensor([0.5]), "normalizer.mean": torch.tensor([2.0]),
        "normalizer.var": torch.tensor([4.0]),
    }  # fmt: skip
    cost = safe_rlhf(tensors, do_normalize=True, architectures=["LlamaForScore"])
    assert scored(cost, resources) == pytest.approx((beaver(cost) + 0.5) / 2, abs=1e-5)
    reward = safe_rlhf(tensors, "helpful", do_normalize=True, score_type="reward")
    helpful = load_given([reward], "helpful", 0.0, resources).score(PROMPTS, ANSWERS, batch_size=4)
    assert helpful == pytest.approx((beaver(reward) + 0.5 - 2) / 2, abs=1e-5)
    with pytest.raises(ModelError, match=r"do_normalize, but the weights lack normalizer\.mean"):
        scored(safe_rlhf(do_normalize=True), resources)


@torch.no_grad()
def verdicts(spec: GivenScorer, unsafe: list[str], safe: list[str]) -> np.ndarray:
    """log p(unsafe) - log p(safe) at the next token, one conversation at a time, first tokens as
    the text has them.
    """
    tokenizer = load_tokenizer(spec.path)
    model = AutoModelForCausalLM.from_pretrained(spec.path).eval()
    found = []
    for ids in whole(tokenizer):
        before = torch.cat(
            [ids, tokenizer(spec.prefix, return_tensors="pt")["input_ids"].long()], 1
        )
        probability = model(input_ids=before).logits[0, -1].softmax(-1)
        odds = []
        for words in (unsafe, safe):
            firsts = {tokenizer(word)["input_ids"][0] for word in words}
            odds.append(sum(probability[i] for i in firsts))
        found.append(float(torch.log(odds[0] / odds[1])))
    return np.array(found)


@pytest.mark.parametrize("prefix", ["", "\n\n"])
def test_a_guard_gives_the_log_odds_of_its_verdict(
    guard: Maker, resources: Resources, prefix: str
) -> None:
    spec = guard(prefix=prefix)
    scores = scored(spec, resources)
    assert (
        scores == pytest.approx(verdicts(spec, ["unsafe"], ["safe"]), abs=1e-4)
        and scores.std() > 0.01
    )


def test_a_guard_may_say_its_verdict_in_several_words(guard: Maker, resources: Resources) -> None:
    spec = guard(unsafe=["unsafe", "bad", "!"], safe=["safe", "good"])
    expected = verdicts(spec, ["unsafe", "bad", "!"], ["safe", "good"])
    assert scored(spec, resources) == pytest.approx(expected, abs=1e-4)


def test_a_prefix_that_merges_with_the_verdict_belongs_to_its_first_token(
    guard: Maker, resources: Resources
) -> None:
    """With a blank before it each word is one token, blank included: what the guard would say."""
    spec = guard(prefix=" ", unsafe=["unsafe"], safe=["safe"])
    tokenizer = load_tokenizer(spec.path)
    first = [tokenizer(f" {word}")["input_ids"][0] for word in ("unsafe", "safe")]
    if first[0] == first[1]:
        pytest.skip("this vocabulary has the blank as a token of its own")
    bare = spec.model_copy(update={"prefix": "", "unsafe": [" unsafe"], "safe": [" safe"]})
    assert scored(spec, resources) == pytest.approx(scored(bare, resources), abs=1e-6)


def test_an_encoder_without_a_template_reads_prompt_and_answer_as_segments(
    encoder: Maker, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    spec = encoder()
    tokenizer = AutoTokenizer.from_pretrained(spec.path)
    model = AutoModelForSequenceClassification.from_pretrained(spec.path)
    with torch.no_grad():
        expected = [
            float(
                model.eval()(
                    **tokenizer(QUESTION, a, return_tensors="pt", return_token_type_ids=True)
                ).logits
            )
            for a in ANSWERS
        ]
    scorer = load_given([spec], "helpful", 0.0, resources)
    assert scorer.score([user(QUESTION)] * 9, ANSWERS, batch_size=4) == pytest.approx(
        expected, abs=1e-5
    )
    assert "cut off" not in caplog.text
    scorer.score([user("Why? " * 50)], ANSWERS[:1], batch_size=1)
    assert "1 of 1 conversations are longer than the 24 tokens" in caplog.text


def in_words(spec: GivenScorer) -> GivenScorer:
    """The scorer with a tokenizer that parts words from signs, as BERT's does."""
    tokenizer = AutoTokenizer.from_pretrained(spec.path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save_pretrained(spec.path)
    return spec


def test_words_that_spell_an_encoders_control_tokens_stay_words(
    encoder: Maker, resources: Resources
) -> None:
    """A [SEP] of the question's own would begin the second segment there."""
    scorer = load_given([in_words(encoder())], "helpful", 0.0, resources)
    spelt, unknown = (
        scorer.score([user(f"Why {text} so?")], ["Yes [SEP] no."], batch_size=1)
        for text in ("[SEP]", "{sep}")
    )
    assert spelt == pytest.approx(unknown, abs=1e-6)


def test_an_encoder_that_counts_positions_from_behind_padding_reads_so_much_less(
    encoder: Maker, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    """RoBERTa's max_position_embeddings is 514 where it reads 512; its tokenizer need not say."""
    spec = encoder()
    AutoModelForSequenceClassification.from_config(
        RobertaConfig(
            vocab_size=len(AutoTokenizer.from_pretrained(spec.path)),
            num_labels=1,
            pad_token_id=1,
            type_vocab_size=2,
            **SIZES | {"max_position_embeddings": 26},
        )
    ).save_pretrained(spec.path)
    scorer = load_given([spec], "helpful", 0.0, resources)
    scorer.score([user("Why? " * 50)], ANSWERS[:1], batch_size=1)
    assert "1 of 1 conversations are longer than the 24 tokens" in caplog.text


def test_an_encoder_reads_what_a_given_template_writes(
    encoder: Maker, resources: Resources, tmp_path: Path
) -> None:
    (tmp_path / "answer.jinja").write_text("{{ messages[-1]['content'] }}")
    scorer = load_given(
        [encoder(template=str(tmp_path / "answer.jinja"))], "helpful", 0.0, resources
    )
    one, other = (
        scorer.score([user(text)] * 9, ANSWERS, batch_size=4) for text in ("Why?", QUESTION)
    )
    assert one == pytest.approx(other) and one.std() > 0.01


def test_words_that_spell_control_tokens_stay_words_in_a_template_of_an_encoder(
    encoder: Maker, resources: Resources, tmp_path: Path
) -> None:
    """The template's own [SEP] parts question and answer; one that is spelt parts nothing."""
    (tmp_path / "pair.jinja").write_text(
        "{{ messages[-2]['content'] }} [SEP] {{ messages[-1]['content'] }}"
    )
    spec = in_words(encoder(template=str(tmp_path / "pair.jinja")))
    scorer = load_given([spec], "helpful", 0.0, resources)
    spelt, unknown = (
        scorer.score([user(f"Why {text} so?")], [f"Yes {text} no."], batch_size=1)
        for text in ("[SEP]", "{sep}")
    )
    assert spelt == pytest.approx(unknown, abs=1e-6)
    segments = load_given([spec.model_copy(update={"template": None})], "helpful", 0.0, resources)
    one, other = (
        each.score([user(QUESTION)] * 9, ANSWERS, batch_size=4) for each in (scorer, segments)
    )
    assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{"])
def test_a_template_of_an_encoder_that_says_nothing_is_refused(
    encoder: Maker, resources: Resources, tmp_path: Path, content: bytes
) -> None:
    """Without a word of it prompt and answer would be read as segments."""
    file = tmp_path / "answer.jinja"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=f"^{file}: .*chat template.* give a Jinja file or null$"):
        load_given([encoder(template=str(file))], "helpful", 0.0, resources)


def test_safe_rlhf_stores_its_weights_in_either_format(
    safe_rlhf: Maker, resources: Resources
) -> None:
    spec = safe_rlhf({"score_head.bias": torch.tensor([0.5])})
    expected = scored(spec, resources)
    file = Path(spec.path) / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    assert scored(spec, resources) == pytest.approx(expected, abs=1e-6)


def test_every_kind_scores_in_bf16_much_as_in_fp32(
    classifier: Maker,
    labels: Maker,
    guard: Maker,
    safe_rlhf: Maker,
    encoder: Maker,
    resources: Resources,
) -> None:
    narrow = resources.model_copy(update={"precision": "bf16"})
    specs = [
        classifier(),
        labels("single_label_classification", "fine"),
        guard(),
        safe_rlhf(),
        encoder(),
    ]
    for spec in specs:
        wide, rounded = (scored(spec, each) for each in (resources, narrow))
        assert rounded == pytest.approx(wide, abs=0.2 * wide.std() + 0.02), spec.kind


# --- answers that did not end, long rows, numbers that are none -----------------------------------


def test_an_answer_that_did_not_end_has_no_end_of_turn(
    classifier: Maker, resources: Resources
) -> None:
    spec = classifier()
    tokenizer = load_tokenizer(spec.path)
    model = AutoModelForSequenceClassification.from_pretrained(spec.path).eval()
    ended = [True, False] * 4 + [True]
    rows = [ids if done else ids[:, :-1] for ids, done in zip(whole(tokenizer), ended, strict=True)]
    with torch.no_grad():
        expected = [float(model(input_ids=ids).logits) for ids in rows]
    assert scored(spec, resources, ended=ended) == pytest.approx(expected, abs=1e-5)


def test_rows_that_are_cut_are_counted_once(
    classifier: Maker, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = load_given([classifier()], "harmful", 0.0, resources)
    long = user("why " * 400)
    scores = scorer.score([long, *PROMPTS], [ANSWERS[0], *ANSWERS], batch_size=2)
    assert caplog.text.count("1 of 10 conversations are longer than the 256 tokens") == 1
    more = scorer.score([user("why " * 500)], ANSWERS[:1], batch_size=1)
    assert more == pytest.approx(scores[:1], abs=1e-5)


def test_a_score_that_is_no_number_is_refused(classifier: Maker, resources: Resources) -> None:
    scorer = load_given([classifier()], "harmful", 0.0, resources)
    scorer.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(
        ModelError, match=r"classifier: the score of row 1 of 9 is nan; check the weights"
    ):
        scorer.score(PROMPTS, ANSWERS, batch_size=4)


# --- several, and back from disk ------------------------------------------------------------------


@pytest.mark.parametrize(("meaning", "sign"), [("harmful", 1.0), ("helpful", -1.0)])
def test_disagreement_raises_a_cost_and_lowers_a_reward(
    classifier: Maker, resources: Resources, meaning: Any, sign: float
) -> None:
    specs = [classifier(f"c{i}", seed=i, higher_is=meaning) for i in range(3)]
    table = np.array([logits(spec.path)[:, 0] for spec in specs])
    scores = load_given(specs, meaning, 0.7, resources).score(PROMPTS, ANSWERS, batch_size=4)
    assert scores == pytest.approx(table.mean(0) + sign * 0.7 * table.std(0), abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "calibration", [Platt(1.7, 0.3), Isotonic(1.2, (-0.5, 0.1, 2.0), (-2.0, 0.25, 0.75))]
)
def test_every_kind_comes_back_from_disk(
    classifier: Maker,
    labels: Maker,
    guard: Maker,
    safe_rlhf: Maker,
    resources: Resources,
    tmp_path: Path,
    calibration: Platt | Isotonic,
    precision: str,
) -> None:
    resources = resources.model_copy(update={"precision": precision})
    bias = {"score_head.bias": torch.tensor([0.5])}
    specs = [
        classifier(higher_is="helpful"),
        labels("single_label_classification", "fine"),
        guard(),
        safe_rlhf(bias),
    ]
    for chosen in (specs, *([spec] for spec in specs)):
        scorer = load_given(chosen, "harmful", 0.5 * (len(chosen) > 1), resources).calibrated(
            calibration
        )
        folder = tmp_path / f"saved{len(chosen)}{chosen[0].kind}"
        scorer.save(folder)
        loaded = Scorer.load(folder, resources)
        before, after = (each.score(PROMPTS, ANSWERS, batch_size=4) for each in (scorer, loaded))
        assert after == pytest.approx(before, abs=1e-5) and loaded.calibration == calibration
    assert not list(tmp_path.glob("saved*/**/*.py"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "calibration", [Platt(1.7, 0.3), Isotonic(1.2, (-0.5, 0.1, 2.0), (-2.0, 0.25, 0.75))]
)
def test_a_scorer_that_dualign_wrote_scores_as_it_served(
    classifier: Maker,
    resources: Resources,
    tmp_path: Path,
    calibration: Platt | Isotonic,
    precision: str,
) -> None:
    resources = resources.model_copy(update={"precision": precision})
    load_given([classifier()], "harmful", 0.0, resources).calibrated(calibration).save(
        tmp_path / "first"
    )
    served = Scorer.load(tmp_path / "first", resources).score(PROMPTS, ANSWERS, batch_size=4)
    given = GivenScorer(path=str(tmp_path / "first"), kind="classifier", higher_is="harmful")
    scorer = load_given([given], "harmful", 0.0, resources)
    assert scorer.score(PROMPTS, ANSWERS, batch_size=4) == pytest.approx(served, abs=1e-5)
    scorer.calibrated(Platt(2.0, 1.0)).save(tmp_path / "second")
    again = Scorer.load(tmp_path / "second", resources).score(PROMPTS, ANSWERS, batch_size=4)
    assert again == pytest.approx(2 * served + 1, abs=1e-5)


# --- params ---------------------------------------------------------------------------------------


def test_params_name_every_kind_of_the_table() -> None:
    """`question` is the judges' own: no params name a scorer of it."""
    assert tuple(kind for kind in KINDS if kind != "question") == get_args(ScorerKind)


SPEC: dict[str, Any] = {"path": "a/b", "kind": "classifier", "higher_is": "harmful"}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"given": []}, "cost_model.given: list should have at least 1 item"),
        (
            {"given": [{**SPEC, "kind": "oracle"}]},
            "cost_model.given.0.kind: input should be 'classifier', 'labels', ",
        ),
        (
            {"given": [{**SPEC, "higher_is": "better"}]},
            "cost_model.given.0.higher_is: input should be 'harmful' or ",
        ),
        ({"given": [{"path": "a/b", "kind": "guard"}]}, "cost_model.given.0.higher_is is missing"),
        (
            {"given": [{**SPEC, "lable": "toxic"}]},
            "cost_model.given.0.lable is not a known key; did you mean 'label'?",
        ),
        ({"given": [{**SPEC, "kind": "labels"}]}, "cost_model.given.0: kind labels needs a label"),
        (
            {"given": [{**SPEC, "kind": "safe_rlhf", "label": "x"}]},
            "cost_model.given.0: kind labels needs a label, ",
        ),
        (
            {"given": [{**SPEC, "kind": "safe_rlhf", "template": "x"}]},
            "cost_model.given.0: kind safe_rlhf has a temp",
        ),
        (
            {"given": [{**SPEC, "safe": ["no"]}]},
            "cost_model.given.0: unsafe, safe and prefix are a guard's verdict",
        ),
        (
            {"given": [{**SPEC, "kind": "guard", "higher_is": "helpful"}]},
            "cost_model.given.0: a guard's score is the ",
        ),
        (
            {"given": [{**SPEC, "kind": "guard", "unsafe": [""]}]},
            "cost_model.given.0.unsafe.0: string should have at least 1 character, got ''",
        ),
        (
            {"given": [SPEC], "backbone": "c/d"},
            "cost_model: given scorers are not trained, so backbone must be sft",
        ),
        (
            {"given": [SPEC], "spread": 1.0},
            "cost_model: spread weighs how far several given scorers differ",
        ),
        ({"spread": 1.0}, "cost_model: spread weighs how far several given scorers differ"),
        ({"spread": -1.0}, "cost_model.spread: input should be greater than or equal to 0"),
    ],
)
def test_what_makes_no_sense_together_is_refused_by_key(section: dict[str, Any], told: str) -> None:
    content = loading.read_yaml(ROOT / "params.yaml")
    content["cost_model"] |= section
    with pytest.raises(ParamsError) as caught:
        loading.check(content, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml: {told}") and "\n" not in str(caught.value)


# --- mistakes -------------------------------------------------------------------------------------


def refused(spec: GivenScorer, resources: Resources) -> str:
    with pytest.raises(DualignError) as caught:
        load_given([spec], "harmful", 0.0, resources)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(spec.path)
    return message.removeprefix(spec.path)


def test_what_does_not_fit_its_kind_is_refused_in_a_line(
    classifier: Maker, labels: Maker, guard: Maker, resources: Resources, tmp_path: Path
) -> None:
    several = labels("single_label_classification", "nasty")
    assert refused(several, resources) == ": has no label 'nasty'; it has 'fine', 'toxic', 'threat'"
    one = several.model_copy(update={"kind": "classifier", "label": None})
    assert "has the outputs ['fine', 'toxic', 'threat']; choose kind labels" in refused(
        one, resources
    )
    beaver = classifier().model_copy(update={"kind": "safe_rlhf"})
    assert "is no score model of Safe RLHF" in refused(beaver, resources)
    same = guard(unsafe=["unsafe"], safe=["unsafely"])
    assert "begin with the same token" in refused(same, resources)
    nowhere = one.model_copy(update={"path": str(tmp_path / "nowhere")})
    assert "no such model folder" in refused(nowhere, resources)
    (tmp_path / "empty").mkdir()
    assert "no usable" in refused(
        one.model_copy(update={"path": str(tmp_path / "empty")}), resources
    )
    unwritten = classifier().model_copy(update={"template": "none.jinja"})
    assert "template none.jinja is no file" in refused(unwritten, resources)


@pytest.mark.parametrize(
    ("name", "precision"), [("rwkv", "fp32"), ("rwkv", "bf16"), ("recurrent_gemma", "fp32")]
)
def test_a_guard_that_reads_padding_is_refused(
    guard: Maker, words: PreTrainedTokenizerBase, name: str, precision: Any
) -> None:
    spec = guard()
    config = copy.deepcopy(LOSING[name])
    config.vocab_size = len(words)
    built(config).save_pretrained(spec.path)
    assert re.match(
        r": \w+ForCausalLM says other things of a text in a padded batch than alone",
        refused(spec, on_cpu(precision=precision)),
    )


def test_an_encoder_that_mixes_padding_into_its_text_is_refused(
    encoder: Maker, resources: Resources
) -> None:
    spec = encoder()
    size = len(AutoTokenizer.from_pretrained(spec.path))
    config = FNetConfig(vocab_size=size, num_labels=1, **SIZES)
    shaken(FNetForSequenceClassification(config)).save_pretrained(spec.path)
    assert "says other things of a text in a padded batch" in refused(spec, resources)


def test_a_policy_is_no_scorer(guard: Maker, resources: Resources) -> None:
    spec = GivenScorer(path=guard().path, kind="classifier", higher_is="harmful")
    assert "lacks score.weight, which would be random" in refused(spec, resources)


def test_several_that_dualign_wrote_are_given_one_by_one(
    classifier: Maker, resources: Resources, tmp_path: Path
) -> None:
    load_given([classifier("a"), classifier("b", 1)], "harmful", 0.5, resources).save(
        tmp_path / "both"
    )
    both = GivenScorer(path=str(tmp_path / "both"), kind="classifier", higher_is="harmful")
    assert "holds several scorers" in refused(both, resources)
    inner = both.model_copy(
        update={"path": str(tmp_path / "both" / "0"), "kind": "labels", "label": "x"}
    )
    assert "has no label 'x'" in refused(inner, resources)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scale": "much"}, "scale: "),
        ({"scale": None}, "scale: "),
        ({"speed": 1.0}, "speed: "),
        ({"scores": [0.0, 1.0], "costs": [0.0]}, "scores and costs differ in length"),
        ({"members": [{"folder": "0"}]}, "members.0.source: "),
    ],
)
def test_a_wrong_card_is_named_by_file_and_key(
    classifier: Maker, resources: Resources, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    load_given([classifier()], "harmful", 0.0, resources).save(tmp_path / "saved")
    card = tmp_path / "saved" / SCORER
    card.write_text(json.dumps({**json.loads(card.read_text()), **change}))
    with pytest.raises(ModelError) as caught:
        Scorer.load(tmp_path / "saved", resources)
    assert str(caught.value).startswith(f"{card}: {told}") and "\n" not in str(caught.value)


def test_an_unknown_kind_in_a_card_is_named(
    classifier: Maker, resources: Resources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load_given([classifier(higher_is="helpful")], "harmful", 0.0, resources).save(
        tmp_path / "saved"
    )
    assert "given, kind classifier, higher is helpful" in caplog.text
    card = tmp_path / "saved" / SCORER
    card.write_text(card.read_text().replace('"classifier"', '"oracle"'))
    with pytest.raises(
        ModelError, match=r"scorer\.json: 'oracle' is no kind of scorer; one of classifier, labels"
    ):
        Scorer.load(tmp_path / "saved", resources)
