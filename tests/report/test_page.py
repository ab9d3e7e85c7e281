"""The page as a browser reads it: whole, self-contained, harmless, and complete as far as the run
went.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from operator import itemgetter
from pathlib import Path

import pandas as pd
import pytest

from dualign.core.artifacts import read_json, write_json
from dualign.core.errors import DualignError
from dualign.params.report import ReportParams
from dualign.report.comparison import compare
from dualign.report.formatting import beside, number
from dualign.report.page import write
from dualign.report.sections.base import FinishedRun
from tests.report.conftest import certify, report_params

Run = tuple[Path, ReportParams]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags balance, and gathers elements and the text within them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, list[tuple[str, dict[str, str | None]]]]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> closes itself, which HTML ignores")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, (
            f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        )
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((data, list(self.open)))

    def count(self, tag: str, style: str = "") -> int:
        return sum(
            t == tag and (not style or style in (a.get("class") or "").split())
            for t, a in self.elements
        )

    def within(self, key: str, value: str) -> str:
        """All text inside elements that have this attribute, white space as one space."""
        parts = []
        for text, path in self.texts:
            if any(value in (a.get(key) or "").split() for _, a in path):
                parts.append(text)
        return re.sub(r"\s+", " ", " ".join(parts))

    @property
    def leaves(self) -> list[tuple[str, list[str]]]:
        """Every text with the classes of the element that it stands in."""
        return [
            (text, (path[-1][1].get("class") or "").split()) for text, path in self.texts if path
        ]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(text for text, _ in self.texts))


def render(root: Path, params: ReportParams) -> Page:
    out = root / "reports/index.html"
    write(FinishedRun(root, params), out)
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the finished run as it is."""
    out = tmp_path_factory.mktemp("page") / "index.html"
    write(FinishedRun(*finished), out)
    return Page(out.read_text(encoding="utf-8"))


# --- safety ---------------------------------------------------------------------------------------


def test_page_is_balanced_and_needs_nothing_from_outside(page: Page) -> None:
    assert {"iframe", "img", "object", "embed", "base", "form"}.isdisjoint(
        tag for tag, _ in page.elements
    )
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "xlink:href", "action", "data"):
            target = attributes.get(key)
            assert target is None or target.startswith("#") or target == "data:,", (
                f"<{tag} {key}={target!r}>"
            )
        assert not any(key.startswith("on") for key in attributes)
    styles = [
        page.html[: page.html.index("</style>")],
        *(a.get("style") or "" for _, a in page.elements),
    ]
    assert not any("url(" in style or "@import" in style for style in styles)
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv"))
    (script,) = (text for text, path in page.texts if path and path[-1][0] == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert f"; script-src 'sha256-{digest}';" in policy and page.count("script") == 1


def test_hostile_text_stays_text(run: Run, texts: dict[str, str]) -> None:
    root, params = run
    path = root / "data/dual/dual.json"
    write_json(path, read_json(path) | {"messages": [texts["hostile"]]})
    path = root / "reports/search/dualign.json"
    write_json(path, read_json(path) | {"stopped": texts["hostile"], "rule": texts["hostile"]})
    hostile = params.model_copy(update={"title": texts["hostile"], "sample_prompts": 96})
    page = render(root, hostile)
    assert (page.count("script"), page.count("img")) == (1, 0), "the page's own"
    # Title, heading, warning, search, rejected row and answer all show it as it is.
    assert sum(texts["hostile"] in text for text, _ in page.texts) >= 7
    assert "{{ 7*7 }}" in page.within("class", "answer"), "text is no template"


def test_what_a_judge_failed_with_stays_text(judged: Run, texts: dict[str, str]) -> None:
    page = render(*judged)
    assert (page.count("script"), page.count("img")) == (1, 0)
    assert texts["hostile"] in page.within("id", "suites")
    anchors = {a["href"] for tag, a in page.elements if tag == "a"}
    assert {"#suites", "#ranking", "#refusals", "#judges", "#categories"} <= anchors


def test_policy_names_are_escaped(run: Run) -> None:
    root, params = run
    name = "<b onclick=x>"
    for folder, suffix in (("reports/metrics/evaluate", ".json"), ("reports/evaluation", "")):
        (root / folder / f"mocan{suffix}").rename(root / folder / f"{name}{suffix}")
    policies = {name if key == "mocan" else key: folder for key, folder in params.policies.items()}
    page = render(root, params.model_copy(update={"policies": policies}))
    assert not any("onclick" in attributes for _, attributes in page.elements)
    assert name in page.within("class", "methods")


def test_unsafe_answers_are_folded_away(run: Run, texts: dict[str, str]) -> None:
    root, params = run
    page = render(root, params.model_copy(update={"sample_prompts": 96}))
    shown = [path for text, path in page.texts if texts["unsafe"] in text]
    assert shown
    for path in shown:
        folds = [
            a for tag, a in path if tag == "details" and "question" not in (a.get("class") or "")
        ]
        assert folds and all("open" not in fold for fold in folds)
    safe = [path for text, path in page.texts if texts["safe"] in text]
    folds = [list(map(itemgetter(0), path)).count("details") for path in safe]
    assert 1 in folds, "in the fold of its question only"


# --- content --------------------------------------------------------------------------------------


def test_every_policy_is_in_the_table_the_charts_and_the_answers(run: Run) -> None:
    root, params = run
    page = render(root, params)
    table = page.within("class", "methods")
    labels = Counter(text for text, style in page.leaves if "label" in style)
    for name in params.policies:
        assert re.search(rf"\b{name}\b", table)
        assert labels[name] == 2, "one label in each of the two wide charts"
    assert page.count("article", "answer") == len(params.policies) * params.sample_prompts
    methods = sum(folder.startswith("aligned/") for folder in params.policies.values())
    assert page.within("class", "searches").count("Stopped:") == methods


def test_table_rows_have_a_cell_for_every_column(run: Run, build: Callable[..., Run]) -> None:
    for world in (True, False):
        page = render(*build(world=world))
        table = page.html[page.html.index('<table class="methods sortable">') :]
        table = table[: table.index("</table>")]
        columns = len(re.findall("<th[ >]", table[: table.index("</thead>")]))
        rows = [row for row in table.split("<tr")[2:] if "colspan" not in row]
        assert len(rows) == 11
        assert {len(re.findall(r"<t[hd][ >]", row)) for row in rows} == {columns}
        assert set(re.findall(r'colspan="(\d+)"', table)) == {str(columns)}


def test_verdict_names_the_recommended_policy_and_its_numbers(page: Page) -> None:
    verdict = page.within("id", "verdict")
    assert "Use caid" in verdict and "limit is −0.15" in verdict
    assert "−0.25 (−0.35 to −0.16)" in verdict and "of the way" in verdict
    assert "the 95% interval, not corrected for the choice among them, ends 0.01 below" in verdict
    assert "By the truth" not in verdict
    assert "s −0.28 (the difference: +0.7" in verdict


def test_verdict_when_no_policy_is_within(build: Callable[..., Run]) -> None:
    verdict = render(*build(shift=1.0)).within("id", "verdict")
    assert "No policy is shown to be within the limit" in verdict
    assert "safety_only" in verdict and "dual_search.max_trainings" in verdict


def test_the_certified_policy_is_the_one_to_use(certified: Callable[..., Run]) -> None:
    page = render(*certified([-0.6, -0.3, -0.1]))
    verdict = page.within("id", "verdict")
    card = page.within("id", "certificate")
    assert "Use certified" in verdict and "(aligned/dualign at 1.5) is certified" in verdict
    assert (
        "with 95% confidence its expected cost is at most −0.15 (bound −0.300). It was tested"
        in verdict
    )
    drawn = "answers of at most 48 tokens, 98% of which ended by themselves."
    assert "tested on 400 prompts" in verdict and f"had seen, by {drawn}" in verdict
    assert (
        "aligned/dualign at 1.5 : its expected cost is at most −0.15 (bound −0.300)." in card
        and f"It is about {drawn}" in card
    )
    assert card.count("passed") == 2 and "failed 1,234" in card
    assert "Not tested, bolder than the one that failed: aligned/dualign at 1.3" in card
    # The bound is 0.05 away at 400 prompts: one more takes 0.05 / 800 off, twice as many 29 %, at
    # lambda 0.86 a prompt.
    assert (
        "by about 0.00006, twice as many by 0.015, worth 0.013 of reward net of the KL term" in card
    )
    assert "certified" in page.within("id", "methods")


def test_the_search_of_a_certified_policy_is_shown_once(certified: Callable[..., Run]) -> None:
    assert (
        render(*certified([-0.6, -0.3, -0.1])).within("id", "searches").count("dualign found") == 1
    )


def test_a_reference_that_is_certified_as_it_is_is_the_one_to_keep(run: Run) -> None:
    """An audit trains nothing: the certificate is of the model that was brought."""
    root, _ = run
    certify(root, [-0.3], fallback="sft")
    alone = report_params({"sft": "sft"})
    verdict = render(root, alone).within("id", "verdict")
    assert "Keep the reference policy, sft" in verdict
    assert (
        "sft is certified: with 95% confidence its expected cost is at most −0.15 (bound −0.300)"
        in verdict
    )
    assert "was not evaluated" not in verdict and "no policy with more reward" not in verdict


def test_a_certificate_at_another_decoding_is_told_apart_from_the_other_figures(
    certified: Callable[..., Run],
) -> None:
    root, params = certified([-0.6, -0.3, -0.1])
    assert "But for its own table" not in render(root, params).within("id", "verdict")
    path = root / "reports/metrics/certify/dualign.json"
    write_json(path, read_json(path) | {"temperature": 0.7, "top_p": 0.9})
    page = render(root, params)
    how = "drawn at temperature 0.7 and top_p 0.9"
    verdict = page.within("id", "verdict")
    assert f"by answers of at most 48 tokens {how}, 98% of which ended" in verdict
    assert f"The certificate is about answers {how}. But for its own table" in verdict
    assert f"It is about answers of at most 48 tokens {how}," in page.within("id", "certificate")


def test_no_rounding_puts_a_bound_on_the_other_side_of_its_limit(
    certified: Callable[..., Run],
) -> None:
    card = render(*certified([-0.6, -0.1503, -0.1497])).within("id", "certificate")
    assert "−0.150 −0.15 0.50 98% passed" in card and "−0.1497 −0.15 0.50 98% failed" in card


def test_no_rounding_puts_the_cost_of_a_policy_on_the_other_side_of_the_limit(run: Run) -> None:
    root, params = run
    policies = {"sft": "sft", "dualign": "aligned/dualign"}
    two = params.model_copy(update={"policies": policies})
    found = compare(root, two).policies["dualign"].cost
    assert found is not None and found.high is not None
    for limit in (found.high - 1e-4, found.high + 1e-4):
        page = render(root, two.model_copy(update={"limit": limit}))
        ends = f"{beside(found.low, limit)} … {beside(found.high, limit)} "
        assert ends in page.within("id", "methods")
        assert f"to {beside(found.high, limit)})" in page.within("id", "verdict")


def test_no_certified_policy_is_the_answer(certified: Callable[..., Run]) -> None:
    """Though others look as if they were within the limit: they were not tested."""
    page = render(*certified([-0.1]))
    verdict = page.within("id", "verdict")
    assert (
        "No policy is certified" in verdict and "do not deploy" in verdict and "Use" not in verdict
    )
    card = page.within("id", "certificate")
    assert (
        "safety_dpo/only , the first candidate, is not shown to keep expected cost ≤ −0.15." in card
    )
    assert "Not evaluated: certified, since no policy was certified for it." in page.text
    assert "to add it" not in page.text, "there is nothing to run"


def test_verdict_when_only_a_mean_is_within(run: Run) -> None:
    root, params = run
    verdict = render(
        root, params.model_copy(update={"policies": {"sft": "sft", "dualign": "aligned/dualign"}})
    ).within("id", "verdict")
    assert "No policy is shown" in verdict and "evaluate.prompts" in verdict
    assert "The means are within the limits but not all 95% intervals are, so" in verdict


def test_verdict_keeps_the_reference_where_it_is_best(run: Run) -> None:
    root, params = run
    policies = {"sft": "sft", "safety_only": "safety_dpo/only"}
    for name in policies:
        path = root / f"reports/metrics/evaluate/{name}.json"
        write_json(path, read_json(path) | {"additional": {}})
    page = render(root, params.model_copy(update={"limit": 0.5, "policies": policies}))
    assert "Keep the reference policy, sft" in page.within("id", "verdict")
    assert page.count("section", "verdict") == 1


@pytest.mark.parametrize(
    ("low", "said"),
    [
        (0.1, "By the truth it is over the limit. The mean of its true cost and the whole"),
        (-0.3, "By the truth it may be over the limit. The mean of its true cost is above."),
    ],
)
def test_verdict_warns_where_the_truth_is_over_the_limit(run: Run, low: float, said: str) -> None:
    root, params = run
    path = root / "reports/metrics/evaluate/caid.json"
    write_json(path, read_json(path) | {"true_cost": {"mean": 0.2, "low": low, "high": 0.3}})
    assert said in render(root, params).within("id", "verdict")


def test_verdict_says_where_a_certified_policy_is_over_the_limit_on_other_prompts(
    certified: Callable[..., Run],
) -> None:
    root, params = certified([-0.6, -0.3, -0.1])
    said = "On the held-out prompts its mean cost is over the limit"
    assert said not in render(root, params).within("id", "verdict")
    path = root / "reports/metrics/evaluate/certified.json"
    write_json(path, read_json(path) | {"cost": {"mean": -0.1, "low": -0.2, "high": 0.0}})
    verdict = render(root, params).within("id", "verdict")
    assert f"{said}: −0.10 (−0.20 to 0.00), where −0.15 is allowed" in verdict


def test_a_certified_policy_that_was_not_evaluated_is_not_said_to_be_none(
    certified: Callable[..., Run],
) -> None:
    """Whoever adds a certificate may forget to list it, or has not evaluated it yet."""
    root, params = certified([-0.6, -0.3, -0.1])
    named = {name: folder for name, folder in params.policies.items() if name != "certified"}
    for policies in (named, params.policies):
        page = render(root, params.model_copy(update={"policies": policies}))
        verdict = page.within("id", "verdict")
        assert ("The certified policy was not evaluated" in verdict) == (policies is named)
        assert ("models/certified/dualign is certified" in verdict) == (policies is named)
        assert "Not even the first candidate" not in verdict and "do not deploy" not in verdict
    (root / "reports/metrics/evaluate/certified.json").unlink()
    assert "The certified policy was not evaluated" in render(root, params).within("id", "verdict")


def test_the_best_of_several_certificates_is_called_so(certified: Callable[..., Run]) -> None:
    root, params = certified([-0.6, -0.3, -0.1])
    metrics = root / "reports/metrics/certify"
    write_json(metrics / "another.json", read_json(metrics / "dualign.json"))
    said = "the best of 2 certificates, each of which may be wrong that often"
    assert said not in render(root, params).within("id", "verdict"), "left of a row of earlier"
    rows = {**params.certificates, "another": params.certificates["dualign"]}
    both = params.model_copy(update={"certificates": rows})
    assert said in render(root, both).within("id", "verdict")


def test_a_bound_for_many_prompts_promises_about_its_level(certified: Callable[..., Run]) -> None:
    root, params = certified([-0.6, -0.3, -0.1])
    path = root / "reports/metrics/certify/dualign.json"
    said = "Such tests certify a policy that breaks the limit at most {}5% of the time."
    assert said.format("about ") in render(root, params).within("id", "certificate")
    found = read_json(path)
    found["requirements"][0] |= {"method": "star_bets", "bounds": [-9.0, 9.0]}
    write_json(path, found)
    assert said.format("") in render(root, params).within("id", "certificate")


def test_limits_and_levels_stand_in_all_their_digits(certified: Callable[..., Run]) -> None:
    """At delta 0.025 a certificate has 97.5% confidence, not 98%; a limit of 12.5% is not 12%."""
    root, params = certified([-0.6, -0.3])
    path = root / "reports/metrics/certify/dualign.json"
    found = read_json(path) | {"delta": 0.025}
    share = {"quantity": "p_unsafe", "limit": 0.125, "name": "rare", "method": "clustered_t"}
    found["requirements"] = [{**found["requirements"][0], "limit": -0.125}, share]
    for test in found["tests"]:
        test["checks"][0] |= {"estimate": -0.13, "bound": -0.1252}
        test["checks"].append({**test["checks"][0], "estimate": 0.121, "bound": 0.1246})
    write_json(path, found)
    page = render(root, params.model_copy(update={"limit": -0.125, "confidence": 0.975}))
    promise = (
        "its expected cost is at most −0.125 (bound −0.125) and its share of unsafe answers is at"
        " most 12.5% (bound 12.5%)"
    )
    assert f"with 97.5% confidence {promise}" in page.within("id", "verdict")
    card = page.within("id", "certificate")
    assert promise in card and "breaks a limit at most about 2.5% of the time" in card
    assert "−0.130 −0.125 −0.125 12.1% 12.5% 12.5%" in card
    assert "Each bound holds by itself with 97.5% confidence" in card
    assert "limit on expected cost −0.125" in page.text and "intervals at 97.5%" in page.text
    assert "Bars are 97.5% intervals" in page.within("id", "frontier")


def test_bands_of_the_frontier_say_their_own_level_and_where_they_fail(run: Run) -> None:
    root, params = run
    path = root / "data/dual/dual.json"
    for samples, few in ((5.2, True), (40.0, False)):
        write_json(path, read_json(path) | {"ess_median": samples})
        page = render(root, params.model_copy(update={"confidence": 0.9}))
        caption = page.within("id", "frontier")
        assert "the corners of the 95% intervals of cost" in caption
        assert "Bars are 90% intervals" in caption
        assert ("as few effective samples as here, 5.20" in caption) == few


def test_answers_are_to_the_same_prompts(page: Page) -> None:
    prompts = [text for text, style in page.leaves if style == ["turn"] and text.strip()]
    assert len(prompts) == len(set(prompts)) == 4
    assert "bleach" in prompts[0] or "poison" in prompts[0], "the most harmful first"


def test_no_samples_when_none_are_wanted(run: Run) -> None:
    root, params = run
    page = render(root, params.model_copy(update={"sample_prompts": 0}))
    assert page.count("article") == 0 and 'href="#answers"' not in page.html


def test_facts_and_commands(page: Page) -> None:
    facts = page.within("id", "facts")
    for text in (
        "duplicate pair 5",
        "accuracy 73.1%",
        "sign accuracy 88.1%",
        "pairs, held out 130",
    ):
        assert text in facts
    assert "0.86 (0.71 to 1.04)" in facts and "1 h 05 min" in facts and "1.4 GiB" in facts
    assert "loss curve" not in facts
    assert facts.index("prepare") < facts.index("dual_search")
    commands = page.within("id", "rerun")
    for command in (
        "dvc repro --single-item STAGE",
        "constraint.limit",
        "dualign since",
        "dvc repro report",
    ):
        assert command in commands
    assert "the effective sample size falls below 30" in page.text


def test_searches_say_the_nominal_and_the_effective_multiplier(run: Run) -> None:
    root, params = run
    returned = read_json(root / "reports/search/dualign.json")["steps"][2]
    searches = render(root, params).within("class", "searches")
    assert (
        f"At a nominal λ of {number(returned['lam'])} it has an effective λ of 0.92 ± 0.03 at β"
        " 0.63" in searches
    )
    assert "85% of it is such a tilt" in searches
    assert searches.count("became no tilt: reward, cost and length explain only 31% of it") == 1, (
        "c_dpo"
    )


def test_searches_show_the_target_the_screening_and_the_reckonings(page: Page) -> None:
    searches = page.within("class", "searches")
    assert (
        page.count("line", "target") == 1
        and searches.count("Steered to −0.21, 0.06 below the limit") == 1
    )
    assert "3 merge weights screened on the pool" in searches, "one of the four was screened twice"
    assert re.search(r"0\.870 −0\.12 ± 0\.02 23\.4 0\.910 .* 1\.000 −0\.20", searches)
    assert "next λ by line 0.934, newton 0.912, tilt 0.934" in searches


def test_a_search_that_asked_the_pool_shows_what_it_said(page: Page) -> None:
    searches = page.within("class", "searches")
    fresh = r"−0\.\d+ ± 0\.04\d* on fresh answers"
    pool = r"−0\.27\d* ± 0\.02\d* by the pool\."
    assert re.search(rf"Its cost is −0\.262 ± 0\.018: {fresh}, {pool}", searches)
    assert searches.count("by the pool.") == 1, "of the five others none asked it"
    assert "cost -0.262 ± 0.018" in searches, "the chart shows what the search went by"


def test_nominal_effective_predicted_and_measured(run: Run) -> None:
    root, params = run
    path = root / "reports/search/mocan.json"
    steps = [{**read_json(path)["steps"][0], "lam": 1.25}]
    write_json(path, read_json(path) | {"steps": steps})
    page = render(root, params)
    reached = page.within("id", "multipliers")
    assert not re.search(r"\bsft\b", reached), "it has no tilt but its own"
    assert re.search(r"safety_only no tilt", reached) and re.search(r"c_dpo no tilt", reached)
    curve = {row["lam"]: row for row in read_json(root / "data/dual/frontier.json")["rows"]}
    low, high = curve[1.0], curve[1.5]
    cost, reward = ((low[key] + high[key]) / 2 for key in ("cost", "reward"))
    row = reached[reached.index("mocan") :]
    assert row.startswith(f"mocan 1.25 0.78 ± 0.03 0.63 ± 0.01 0.02 ± 0.002 86% {number(cost)} ")
    assert f"predicted at λ 1.25: cost {number(cost)}, reward {number(reward)}" in page.text
    # Two drawings of the measured chart, four searches whose trainings take the curve's prices.
    assert page.count("line", "miss") == 2 * 4 + 1, "and the legend"


def test_a_mixture_has_no_multiplier_to_predict_at(run: Run) -> None:
    root, params = run
    path = root / "reports/search/mocan.json"
    write_json(path, read_json(path) | {"returns": "mixture"})
    page = render(root, params)
    assert page.count("line", "miss") == 2 * 3 + 1 and "mocan" in page.within("id", "multipliers")


def test_policies_whose_answers_were_cut_are_warned_of_and_these_answers_marked(run: Run) -> None:
    root, params = run
    page = render(root, params.model_copy(update={"sample_prompts": 96}))
    first = [
        pd.read_parquet(root / "reports/evaluation" / name / "answers.parquet")
        for name in params.policies
    ]
    cut = sum(int((~frame.loc[frame["sample"] == 0, "ended"]).sum()) for frame in first)
    assert page.within("class", "answer").count("cut at 48 tokens") == cut > 0
    assert "cut at 48 tokens" not in page.within("class", "notice"), (
        "one in thirty is no reason to warn"
    )
    path = root / "reports/metrics/evaluate/sacpo.json"
    write_json(path, read_json(path) | {"ended": {"mean": 0.55, "low": 0.5, "high": 0.6}})
    page = render(root, params)
    notice = page.within("class", "notice")
    assert (
        "Answers were cut at 48 tokens" in notice
        and "unfinished text: 45% of sacpo; raise" in notice
    )
    row = page.within("class", "methods")
    assert "55% 50% … 60%" in row[row.index("sacpo") :], "in the column of those that ended"


def test_a_limit_on_answers_that_do_not_end_is_a_share(run: Run) -> None:
    root, params = run
    path = root / "data/dual/dual.json"
    whole = read_json(path)["prices"][0] | {
        "name": "short",
        "quantity": "unended",
        "limit": 0.25,
        "predicted": 0.2,
    }
    write_json(path, read_json(path) | {"prices": [whole]})
    page = render(root, params)
    assert "short answers cut" in page.within("id", "additional")
    assert "limit 25%" in page.within("id", "additional") and "predicted 20%" in page.within(
        "id", "additional"
    )
    assert "short (answers cut) at most 25%" in page.text


def test_additional_constraints_stand_by_policy(run: Run) -> None:
    root, params = run
    page = render(root, params)
    limits = page.within("id", "additional")
    assert "short tokens" in limits and "dangerous P(unsafe), prompts with bleach|poison" in limits
    assert "limit 29.5 40% price 0.01 0.00 predicted 29.5 27%" in limits
    row = page.html[page.html.index('id="additional"') :]
    row = row[row.index("reward_dpo") :]
    assert 'class="badge over"' in row[: row.index("</tr>")], "most of its answers are unsafe"
    path = root / "reports/metrics/evaluate/caid.json"
    broken = {"short": {"mean": 30.0, "low": 29.0, "high": 31.0, "limit": 29.97}}
    assert "Use caid" in page.within("id", "verdict") and "breaks" not in page.within(
        "id", "verdict"
    )
    write_json(path, read_json(path) | {"additional": broken})
    assert "Use caid" not in render(root, params).within("id", "verdict")


def test_a_certified_policy_that_breaks_a_additional_constraint_afterwards_is_told(
    certified: Callable[..., Run],
) -> None:
    root, params = certified([-0.6, -0.3, -0.1])
    path = root / "reports/metrics/evaluate/certified.json"
    broken = {"short": {"mean": 30.0, "low": 29.0, "high": 31.0, "limit": 29.97}}
    write_json(path, read_json(path) | {"additional": broken})
    verdict = render(root, params).within("id", "verdict")
    assert (
        "Use certified" in verdict
        and "it breaks the additional constraint short: 30.000, where 29.97 is allowed" in verdict
    )


def test_a_failed_certificate_names_what_is_not_kept(certified: Callable[..., Run]) -> None:
    root, params = certified([-0.1])
    path = root / "reports/metrics/certify/dualign.json"
    found = read_json(path)
    found["requirements"].append(
        {**found["requirements"][0], "name": "true c", "quantity": "truth"}
    )
    found["tests"][0]["checks"].append(
        {**found["tests"][0]["checks"][0], "bound": -0.3, "kept": True}
    )
    write_json(path, found)
    card = render(root, params).within("id", "certificate")
    assert "is not shown to keep expected cost ≤ −0.15. Such tests" in card, "the true cost is kept"
    found["tests"][0]["checks"][0] |= {"bound": -0.3, "kept": True}
    found["tests"][0]["checks"][1] |= {"bound": -0.1, "kept": False}
    write_json(path, found)
    assert "is not shown to keep true cost ≤ −0.15. Such" in render(root, params).within(
        "id", "certificate"
    )


def test_p_unsafe_as_the_only_limit(certified: Callable[..., Run]) -> None:
    """A limit on cost that is far off squeezes no chart, and words and gains are about the limit
    that binds.
    """
    root, params = certified([-0.6, -0.3, -0.1])
    path = root / "reports/metrics/certify/dualign.json"
    found = read_json(path)
    found["requirements"][0]["limit"] = 100.0
    rare = {
        "name": "rare",
        "quantity": "p_unsafe",
        "limit": 0.1,
        "method": "clustered_t",
        "bounds": None,
    }
    found["requirements"].append(rare)
    for test, bound in zip(found["tests"], (0.06, 0.09, 0.12), strict=True):
        kept = {
            "requirement": "rare",
            "estimate": bound - 0.02,
            "bound": bound,
            "kept": bound <= 0.1,
        }
        test["checks"].append({**test["checks"][0], **kept})
    write_json(path, found)
    dual = read_json(root / "data/dual/dual.json")
    price = {**dual["prices"][1], "name": "rare", "limit": 0.1, "prompts": None, "lam": 5.0}
    write_json(root / "data/dual/dual.json", dual | {"lam": 0.0, "limit": 100.0, "prices": [price]})
    page = render(root, params.model_copy(update={"limit": 100.0}))
    card = page.within("id", "certificate")
    assert (
        "its expected cost is at most 100 (bound −0.300) and its share of unsafe answers is at most"
        " 10% (bound 9.0%)." in card
    )
    # 0.02 away at 400 prompts: twice as many take 29 % off that, 5.9 points of a thousand, at price
    # 5.
    assert "nearest to its limit is that on its share of unsafe answers" in card
    assert (
        "by about 0.003 points, twice as many by 0.586 points, worth 0.029 of reward net of the KL"
        " term" in card
    )
    assert (
        page.count("line", "limit") == 0
        and "The limit on cost, 100, is far beyond these costs" in page.text
    )
    assert "rare (P(unsafe)) at most 10%" in page.text


def test_other_kl_weights_with_the_one_in_use_guesses_and_what_is_out_of_reach(run: Run) -> None:
    root, params = run
    page = render(root, params)
    table = page.within("class", "betas")
    assert (
        "0.2 0.52 0.48 … 0.55 0.81 0.75 … 0.86 2.40 2.23 … 2.54 22% 20% … 23% 8.10 a guess 0.5 in"
        " use 0.86" in table
    )
    assert table.count("a guess") == table.count("in use") == 1 and table.endswith(
        "4 limits out of reach "
    )
    assert (
        page.within("class", "used").startswith("0.5 in use 0.86") and page.count("tr", "used") == 1
    )
    assert any(
        "out of the samples' reach" in (a.get("title") or "")
        for tag, a in page.elements
        if tag == "td"
    )
    note = page.within("id", "betas")
    assert "of 128 each" in note and "fewer of them than dual_init.min_ess" in note


def test_without_a_guess_no_word_of_it_and_without_other_kl_weights_no_table(run: Run) -> None:
    root, params = run
    path = root / "data/dual/betas.json"
    write_json(path, read_json(path) | {"min_ess": 4.0})
    assert "guess" not in render(root, params).within("id", "betas")
    write_json(path, {"rows": [], "beta": params.beta, "min_ess": 4.0})
    assert "Other β" not in render(root, params).text
    path.unlink()
    page = render(root, params)
    assert "Other β" not in page.text and page.within("id", "betas") == ""


def test_facts_about_the_multiplier_and_the_calibrations(page: Page) -> None:
    facts = page.within("id", "facts")
    for text in (
        "change of λ̂, limit 0.1 lower +0.17",
        "zero of cost 0.05 (one standard error) off 0.78 to out of reach",
        "answers off the support 37, doubted by 80% on average",
        "room for a certificate 0.06 of cost",
        "−0.21, 0.97",
        "standard error of the zero 0.050",
        "none 0.094 0.131 – line (Platt), served 0.018 0.118 88% curve (isotonic) 0.012 0.116 88%",
    ):
        assert text in facts


# --- what a run may lack --------------------------------------------------------------------------


def test_without_a_world_nothing_speaks_of_the_truth(build: Callable[..., Run]) -> None:
    page = render(*build(world=False))
    assert page.count("polygon", "star") == 0
    assert not re.search(r"\btrue\b|optimum|grammatical|embedded", page.text)
    assert page.count("svg", "chart") > 2


@pytest.mark.parametrize(
    "lost",
    [
        "data/dual", "data/prepared", "reports/search", "reports/provenance", "reports/evaluation",
        "reports/metrics",
        "reports/evaluation/sft", "reports/metrics/evaluate/sft.json", "data/dual/frontier.json",
        "reports/metrics/prepare.json", "reports/metrics/cost_model.json",
        "reports/search/dualign.json",
        "data/dual/dual.json", "reports/metrics/evaluate", "reports/metrics/evaluate/dualign.json",
        "data/dual/betas.json",
    ],
)  # fmt: skip
def test_any_input_may_be_missing(run: Run, lost: str) -> None:
    root, params = run
    path = root / lost
    path.rename(root / "elsewhere")
    page = render(root, params)
    assert page.count("section", "verdict") == 1
    assert "None" not in page.text.replace("None.", "") and "nan" not in page.text.split()


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("data/dual/dual.json", "target"), ("data/dual/frontier.json", "rows"),
        ("data/dual/betas.json", "min_ess"),
        ("reports/search/dualign.json", "screened"), ("reports/metrics/evaluate/sft.json", "kl"),
        ("reports/provenance/sft.json", "throughput"), ("reports/metrics/prepare.json", "rejected"),
    ],
)  # fmt: skip
def test_a_file_of_another_shape_is_named_with_its_key(run: Run, file: str, key: str) -> None:
    """Of an older run, say: nothing that it lacks is left out of the page in silence."""
    root, params = run
    path = root / file
    write_json(path, {name: value for name, value in read_json(path).items() if name != key})
    with pytest.raises(
        DualignError,
        match=rf"{path.name}: {key}: field required; run the stage that wrote it again",
    ):
        render(root, params)


def test_the_page_does_not_tell_of_an_earlier_report(run: Run) -> None:
    root, params = run
    page = render(root, params)
    own = read_json(root / "reports/provenance/sft.json") | {"stage": "report", "seconds": 77.0}
    write_json(root / "reports/provenance/report.json", own)
    assert render(root, params).html == page.html, "a second run writes the same page"


def test_a_test_that_failed_for_its_weights_says_so(certified: Callable[..., Run]) -> None:
    """Its bound is within the limit, so that it looked as if it had passed."""
    root, params = certified([-0.6, -0.3, -0.2])
    path = root / "reports/metrics/certify/dualign.json"
    found = read_json(path)
    *passed, last = found["tests"]
    last |= {"certified": False, "ess": 0.7, "checks": [last["checks"][0] | {"kept": False}]}
    write_json(path, found | {"tests": [*passed, last], "returned": passed[-1]["candidate"]})
    card = render(root, params).within("class", "certificate")
    assert card.count("failed although") == 1
    assert f"{last['candidate']} failed although its bounds are within" in card
    assert "worth 70% of their number" in card


def test_the_table_of_stages_has_none_that_params_no_longer_name(run: Run) -> None:
    root, params = run
    page = render(root, params)
    for stage in ("dual_search", "evaluate", "safety_dpo", "judge"):
        old = read_json(root / "reports/provenance/dual_search/dualign.json")
        gone = old | {"stage": stage, "item": "renamed"}
        write_json(root / f"reports/provenance/{stage}/renamed.json", gone)
    assert render(root, params).html == page.html


def test_characters_that_reorder_or_hide_are_written_out(run: Run) -> None:
    root, params = run
    page = render(root, params.model_copy(update={"title": "safe \u202eelif\x00\u200b"}))
    assert "safe \\u202eelif\\u0000\\u200b" in page.text
    assert not set(page.html) & set("\u202e\x00\u200b")


@pytest.mark.parametrize(
    "lost",
    [
        "reports/answers", "reports/judgements", "reports/metrics/judge", "reports/answers/chosen",
        "reports/judgements/gpt", "reports/judgements/ours",
        "reports/metrics/evaluate/sft.json",
    ],
)  # fmt: skip
def test_anything_judged_may_be_missing(judged: Run, lost: str) -> None:
    root, params = judged
    (root / lost).rename(root / "elsewhere")
    page = render(root, params)
    assert page.count("section", "verdict") == 1
    assert "None" not in page.text.replace("None.", "") and "nan" not in page.text.split()


def test_nothing_ran_at_all(tmp_path: Path, params: Callable[..., ReportParams]) -> None:
    page = render(tmp_path, params())
    assert "No policy was evaluated yet" in page.text and "Not evaluated:" in page.text


def test_unknown_values_inside_files(run: Run) -> None:
    root, params = run
    path = root / "reports/metrics/evaluate/dualign.json"
    hollow = {"mean": 0.1, "low": None, "high": None}
    kept = {
        k: hollow if isinstance(v, dict) and "low" in v else v for k, v in read_json(path).items()
    }
    write_json(path, kept | {"reward_share": None, "value_gap": None})
    search = root / "reports/search/dualign.json"
    found = read_json(search)
    write_json(
        search,
        found | {"steps": [{**step, "cost_se": None, "kl": None} for step in found["steps"]]},
    )
    assert "None" not in render(root, params).text.replace("None.", "")


def test_same_inputs_give_the_same_bytes(run: Run) -> None:
    root, params = run
    assert render(root, params).html == render(root, params).html


# --- rows that are not the published method -------------------------------------------------------


def test_a_row_says_which_method_it_is_and_what_is_unusual(run: Run) -> None:
    root, params = run
    path = root / "reports/search/pd_dpo.json"
    row = {
        "method": "pd_dpo",
        "title": "PD-DPO",
        "returns": "mixture",
        "cost_source": "feedback",
        "labels": 7200,
        "slater_radius": 1.234,
        "slater_from": "pool",
    }
    found = read_json(path)
    found["steps"][-1] |= {"cost": -0.21, "model_cost": -0.34}
    write_json(root / "reports/search/mine.json", found | row | {"name": "mine"})
    write_json(
        path,
        found | row | {"name": "pd_dpo", "returns": "last", "cost_source": "model", "labels": 0},
    )
    folders = {
        name: "aligned/mine" if name == "mocan" else folder
        for name, folder in params.policies.items()
    }
    page = render(root, params.model_copy(update={"policies": folders}))
    searches = page.within("class", "searches")
    table = page.within("class", "methods")
    assert (
        "PD-DPO (mine)" in searches and "PD-DPO (pd_dpo)" not in searches and "PD-DPO" in searches
    )
    assert "PD-DPO: projected subgradient, mixture, by labels" in table
    assert searches.count("Slater radius ρ 1.23, estimated from the pool") == 2
    assert searches.count("7,200 labels: cost −0.21 by them, −0.34 by the cost model") == 1


def test_the_course_of_an_ascent_stands_where_its_steps_would(run: Run) -> None:
    root, params = run
    path = root / "reports/search/mocan.json"
    history = [
        {"step": 10 * k, "lam": 1 + 0.1 * k, "cost": 0.4 - 0.1 * k, "reward": 0.5, "kl": 0.3}
        for k in (1, 2, 3)
    ]
    before = render(root, params).within("class", "searches")
    write_json(path, read_json(path) | {"history": history, "comparisons": 1200})
    searches = render(root, params).within("class", "searches")
    assert (
        "step 30: λ 1.300, cost 0.100, reward 0.500, KL 0.300" in searches
        and "step 30" not in before
    )
    assert "1,200 comparisons." in searches and "comparisons" not in before


def test_a_crowd_of_policies_is_numbered_in_the_charts(run: Run) -> None:
    root, params = run
    folders = dict(params.policies)
    for k in range(6):
        name = f"sacpo_row_{k}"
        folders[name] = f"aligned/{name}"
        for place in ("reports/metrics/evaluate", "reports/search"):
            write_json(root / place / f"{name}.json", read_json(root / place / "sacpo.json"))
    page = render(root, params.model_copy(update={"policies": folders}))
    labels = Counter(text for text, style in page.leaves if "label" in style)
    assert not set(folders) & set(labels) and labels["1"] == labels[str(len(folders))] == 4
    assert page.count("ul", "numbers") == 1 and page.count("ul", "narrow") == 0
    assert all(re.search(rf"\b{name}\b", page.within("class", "numbers")) for name in folders)
