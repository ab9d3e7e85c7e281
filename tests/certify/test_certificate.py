"""The certificate: the sequence of tests, the file and its check."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dualign.certify import certificate, command, evidence
from dualign.certify.certificate import Origin, Terms
from dualign.certify.evidence import Evidence
from dualign.certify.requirement import Requirement
from dualign.certify.sequence import fixed_sequence
from dualign.certify.verification import absent, verify
from dualign.core.artifacts import read_json, sha256, write_json, write_parquet
from dualign.core.errors import DataError, DualignError
from dualign.core.schema import ANSWERS, LABELS, PROMPTS, REWEIGHTED, Message, prompt_id, user
from dualign.math.bounds import corrected_upper_bound, upper_bound
from dualign.params.certify import CertifyRun
from tests.written import solved


def question(number: int) -> list[Message]:
    """A prompt that speaks of `odd` or `even`."""
    return user(f"{'odd' if number % 2 else 'even'} {number}")


NUMBERS = {prompt_id(question(number)): number for number in range(60)}


def answers(mean: float = 0.0, prompts: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three correlated answers to each prompt, costs within -4 and 4."""
    rng = np.random.default_rng(seed)
    costs = mean + 0.3 * rng.normal(size=(prompts, 1)) + 0.4 * rng.normal(size=(prompts, 3))
    return costs.clip(-4, 4).ravel(), np.array(list(NUMBERS)[:prompts]).repeat(3)


# --- the sequence ---------------------------------------------------------------------------------


def test_tests_stop_at_the_first_failure_and_draw_no_more_answers() -> None:
    def candidates() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, mean in (("safest", -2.0), ("middle", -1.0), ("harmful", 0.2)):
            yield name, *answers(mean)
        pytest.fail("the sequence went on after a failure")

    decision = fixed_sequence(candidates(), limit=0.0)
    assert [test.name for test in decision.tested] == ["safest", "middle", "harmful"]
    assert decision.certified == ("safest", "middle") and decision.returned == "middle"
    for test, mean in zip(decision.tested, (-2.0, -1.0, 0.2), strict=True):
        (check,) = test.checks
        assert check.bound == upper_bound(*answers(mean)) and test.certified == check.kept == (
            check.bound <= 0
        )
        assert (check.prompts, check.answers, check.raised) == (40, 120, 0.0)
        assert check.estimate == pytest.approx(answers(mean)[0].mean())


def test_a_safe_candidate_after_a_failure_is_not_certified() -> None:
    decision = fixed_sequence([("bad", *answers(1.0)), ("good", *answers(-2.0))], limit=0.0)
    assert decision.certified == () and decision.returned is None and len(decision.tested) == 1


def test_all_may_pass_and_the_bound_may_equal_the_limit() -> None:
    bound = upper_bound(*answers(-1.0))
    decision = fixed_sequence([("a", *answers(-2.0)), ("b", *answers(-1.0))], limit=bound)
    assert decision.returned == "b"


def test_the_limit_of_clopper_pearson_is_a_probability_and_raised_costs_are_reported() -> None:
    costs, prompts = answers(-0.8)
    decision = fixed_sequence(
        [("a", costs, prompts)], limit=0.2, method="clopper_pearson", bounds=(-1.0, 4.0)
    )
    (check,) = decision.tested[0].checks
    assert check.estimate == pd.Series(costs > 0).groupby(prompts).any().mean()
    assert check.raised == (costs < -1).mean() > 0
    assert check.kept == (check.bound <= 0.2)


@pytest.mark.parametrize(
    ("candidates", "limit", "message"),
    [
        ([], 0.0, "no candidates"),
        ([("a", *answers(-2)), ("a", *answers(-2))], 0.0, "'a' stands in the order twice"),
        ([("a", [1.0], ["p"])], 0.0, "candidate 'a': prompts: .* at least 2 prompts"),
        ([("a", *answers())], float("nan"), "limit must be a finite number"),
        ([("a", answers()[0])], 0.0, r"candidate 'a': a candidate is \(name, costs, prompts\)"),
    ],
)
def test_sequences_that_cannot_be_tested(candidates: list[Any], limit: float, message: str) -> None:
    with pytest.raises(DualignError, match=message):
        fixed_sequence(candidates, limit=limit)


# --- the file -------------------------------------------------------------------------------------

OPEN = (
    "This shows that the files agree with each other; it does not show that the cost model gave"
    " these costs (--rescore), that no file was made anew (sign, then --key), that prompts were"
    " unseen, and limits set before.\n"
)
MEANS = {"safest": -2.0, "middle": -1.0, "harmful": 0.2, "never tested": 1.0}


def save(path: Path, costs: np.ndarray, prompts: np.ndarray) -> Path:
    """Answers of 10 tokens and, to odd prompts, 20; those speak of `odd`. The first answers to two
    of them were cut.
    """
    odd = np.array([NUMBERS[name] % 2 for name in prompts], bool)
    ended = ~np.isin(np.arange(len(prompts)), [3, 9])
    frame = pd.DataFrame(
        {"prompt_id": prompts, "cost": costs, "length": np.where(odd, 20, 10), "ended": ended}
    )
    write_parquet(path, completed(frame), ANSWERS)
    return path


def completed(frame: pd.DataFrame) -> pd.DataFrame:
    """Answers with all that a table of them has beside prompt_id, cost, length and ended."""
    return frame.assign(
        prompt=[question(NUMBERS[name]) for name in frame["prompt_id"]],
        sample=frame.groupby("prompt_id").cumcount(),
        response=[f"answer {row}" for row in range(len(frame))],
        tokens=[[7] * length for length in frame["length"]],
    )


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Path]:
    return {
        name: save(tmp_path / "reports" / name / "answers.parquet", *answers(mean))
        for name, mean in MEANS.items()
    }


def issue(
    path: Path, tables: dict[str, Path], limit: float, **options: Any
) -> certificate.Certificate:
    """A certificate of the model's cost alone."""
    keys = {key: options.pop(key) for key in ("method", "bounds") if key in options}
    required = Requirement(
        name="c", quantity="cost", limit=limit, **{"method": "clustered_t", **keys}
    )
    return certify(path, list(tables), lambda name: Evidence(tables[name]), [required], **options)


def certify(
    path: Path,
    names: list[str],
    evidence_of: Callable[[str], Evidence],
    required: list[Requirement],
    origin: Origin | None = None,
    **options: Any,
) -> certificate.Certificate:
    """A certificate of answers of at most 20 tokens."""
    terms = Terms(names, required, max_new_tokens=20, **options)
    return certificate.issue(path, terms, evidence_of, origin=origin)


@pytest.fixture
def issued(tmp_path: Path, tables: dict[str, Path]) -> Path:
    path = tmp_path / "reports" / "certificate.json"
    issue(
        path,
        tables,
        0.0,
        delta=0.1,
        method="betting",
        bounds=(-4.0, 4.0),
        seed=3,
        sampling_seeds={"certify": 5},
    )
    return path


def checked(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and the one line of the command on a certificate."""
    status = command.main(["verify", str(path)])
    line, *rest = capsys.readouterr().out.splitlines(keepends=True)
    assert status == 1 or rest == [OPEN]
    return status, line


def test_a_certificate_holds_all_that_its_check_needs(
    issued: Path, tables: dict[str, Path]
) -> None:
    content = read_json(issued)
    assert content["candidates"] == list(MEANS) and content["certified"] == ["safest", "middle"]
    assert content["returned"] == "middle" and sorted(content["tables"]) == [
        "harmful",
        "middle",
        "safest",
    ]
    assert content["tables"]["safest"]["path"] == "safest/answers.parquet"
    assert (content["delta"], content["requirements"][0]["bounds"], content["seed"]) == (
        0.1,
        [-4.0, 4.0],
        3,
    )
    assert (
        content["sampling_seeds"] == {"certify": 5}
        and content["versions"]["numpy"] == np.__version__
    )
    assert verify(issued) == certificate.read(issued)
    (middle,) = content["tested"][1]["checks"]
    assert middle["bound"] == upper_bound(
        *answers(-1.0), delta=0.1, method="betting", bounds=(-4, 4), seed=3
    )


def test_it_holds_wherever_its_folder_is_moved(
    issued: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(issued.parent, tmp_path / "elsewhere")
    status, line = checked(tmp_path / "elsewhere" / issued.name, capsys)
    assert status == 0 and "holds: 'middle' keeps E[c] <= 0 (betting bound -" in line
    assert (
        "confidence 0.9, for answers of at most 20 tokens, of which 98.33 % ended by themselves; "
        in line
    )
    assert line.endswith(
        "not compared, since not there: its plan, its prompts, its limits, the certified policy\n"
    )


def test_no_certified_policy_is_a_certificate(
    tmp_path: Path, tables: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "certificate.json"
    assert issue(path, tables, -3.0).returned is None
    status, line = checked(path, capsys)
    assert status == 4
    assert (
        "holds: no certified policy; 'safest' is not shown to keep E[c] <= -3 (clustered_t bound"
        " -1.9" in line
    )


def test_the_quantity_of_clopper_pearson_is_named(tmp_path: Path, tables: dict[str, Path]) -> None:
    issued = issue(tmp_path / "certificate.json", tables, 0.3, method="clopper_pearson")
    assert "keeps P(unsafe answer to a prompt) <= 0.3 (clopper_pearson bound" in issued.statement


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = read_json(path)
        change(content)
        write_json(path, content)

    return apply


def other_answers(path: Path) -> None:
    save(path.parent / "middle" / "answers.parquet", *answers(-1.001))


def other_answers_and_hash(path: Path) -> None:
    other_answers(path)
    digest = sha256(path.parent / "middle" / "answers.parquet")
    edit(lambda content: content["tables"]["middle"].update(sha256=digest))(path)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (other_answers, "the answers of 'middle' .* are not those certified: sha256 differs"),
        (other_answers_and_hash, "c estimate of 'middle' is -.*, but the answers give -"),
        (
            edit(lambda c: c["tested"][0]["checks"][0].update(bound=-9.0)),
            r"c bound of 'safest' is -9\.0, but the answers give -",
        ),
        (edit(lambda c: c["tested"][2].update(certified=True)), "certified of 'harmful' is True"),
        (edit(lambda c: c.update(seed=4)), "c bound of 'safest' is"),
        (edit(lambda c: c.update(delta=0.01)), "c bound of 'safest' is"),
        (
            edit(lambda c: c.update(returned="harmful")),
            "returned is 'harmful', but the answers give 'middle'",
        ),
        (edit(lambda c: c.update(certified=["safest"])), "certified is"),
        (
            edit(lambda c: c["requirements"][0].update(limit=0.6)),
            "'never tested': its answers, next in the order, are not",
        ),
        (edit(lambda c: c["tested"].pop()), "tested is"),
        (
            edit(lambda c: c["candidates"].reverse()),
            "'never tested': its answers, next in the order",
        ),
        (
            edit(lambda c: c.update(max_new_tokens=19)),
            "safest.*: an answer of 20 tokens was not cut at .* 19",
        ),
        (
            edit(lambda c: c.update(max_new_tokens=30)),
            "safest.*: an answer of 20 tokens was not cut at .* 30",
        ),
        (
            edit(lambda c: c["ended"].update(middle=1.0)),
            r"ended of 'middle' is 1\.0, but the answers give 0\.983",
        ),
        (edit(lambda c: c["ended"].pop("harmful")), "ended is"),
        (
            edit(lambda c: c.pop("max_new_tokens")),
            "max_new_tokens is missing; another version wrote it, run",
        ),
        (edit(lambda c: c["tables"].update(other={"path": "x", "sha256": ""})), "tables is"),
        (
            edit(lambda c: c["requirements"][0].update(bounds=[-4.0, -3.0])),
            "candidate 'safest': costs: .* more than bounds allow",
        ),
        (
            edit(lambda c: c["tables"]["safest"].update(path="gone.parquet")),
            "gone.parquet: no such file",
        ),
        (edit(lambda c: c.update(delta=1.5)), "not a certificate: delta: "),
        (
            edit(lambda c: c.pop("seed")),
            "seed is missing; another version wrote it, run certify again",
        ),
        (edit(lambda c: c["tested"][0].update(checks=[])), "checks of 'safest' is 0"),
        (
            edit(lambda c: c["tested"][0]["checks"][0].update(bound=None)),
            r"not a certificate: tested\.0\.checks\.0\.bound",
        ),
        (edit(lambda c: c.update(note="trust me")), "not a certificate: note: "),
        (
            edit(lambda c: c.update(samples_per_prompt=4)),
            "samples_per_prompt is 4, but every prompt has 3 answers",
        ),
        (edit(lambda c: c["labels"].update(other={"path": "x", "sha256": ""})), "labels is"),
        (
            edit(lambda c: c["requirements"][0].update(prompts="(")),
            r"requirements\.0\.prompts: .*this is no regular expression",
        ),
        (
            edit(lambda c: c["requirements"][0].update(quantity="cvar")),
            "c: a cvar needs its threshold, and a level",
        ),
        (
            edit(lambda c: c["requirements"][0].update(bounds=None)),
            "c: method betting needs bounds",
        ),
        (
            edit(lambda c: c["requirements"][0].update(quantity="truth")),
            "c: truth is not tested by betting",
        ),
        (lambda path: path.write_text("[" * 100_000), "nested too deep"),
        (lambda path: path.write_text("{}"), "delta is missing"),
        (lambda path: path.write_text("3"), "not a certificate"),
        (lambda path: path.write_text("[]"), "not a certificate"),
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_whatever_does_not_match_is_named_in_one_line(
    issued: Path, tamper: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(issued)
    status, line = checked(issued, capsys)
    assert status == 1 and line.startswith(str(issued))
    with pytest.raises(DualignError, match=message):
        verify(issued)


def test_answers_without_a_cost_are_refused(tmp_path: Path) -> None:
    costs, prompts = answers()
    table = save(
        tmp_path / "answers.parquet", np.where(np.arange(120) == 7, np.nan, costs), prompts
    )
    with pytest.raises(DataError, match="candidate 'sft': costs: nan at row 7"):
        issue(tmp_path / "certificate.json", {"sft": table}, 0.0)
    assert not (tmp_path / "certificate.json").exists()


def test_the_command(issued: Path) -> None:
    command = [sys.executable, "-m", "dualign.certify.command", "verify"]
    right = subprocess.run([*command, str(issued)], capture_output=True, text=True, check=False)
    assert right.returncode == 0 and "holds: 'middle'" in right.stdout and right.stderr == ""
    issued.write_text(json.dumps({}))
    wrong = subprocess.run([*command, str(issued)], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1 and len(wrong.stdout.splitlines()) == 1 and wrong.stderr == ""


def test_the_command_loads_no_torch(issued: Path) -> None:
    code = (
        "import sys; from dualign.certify import command; status = command.main(['verify',"
        f" {str(issued)!r}])"
    )
    light = f"{code}; sys.exit(status or ('torch' in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", light], capture_output=True, check=False).returncode
        == 0
    )


def test_a_folder_stands_for_the_certificates_in_it(
    issued: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(
        issued.parent, issued.parent.parent / ".certificate.9.tmp"
    )  # of a process that was killed
    for folder in (issued.parent, issued.parent.parent):
        assert command.main(["verify", str(folder)]) == 0
        line, _ = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{issued} holds: 'middle'")
    empty = tmp_path / "nothing here"
    empty.mkdir()
    for wrong in (empty, issued.with_name("certificat.json")):
        assert command.main(["verify", str(issued), str(wrong)]) == 1
        first, second, _ = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{issued} holds") and second.startswith(
            f"{wrong}: holds no certificate"
        )
    with pytest.raises(DualignError, match="no JSON file"):
        certificate.read(issued.parent)


# --- several requirements -------------------------------------------------------------------------

MODEL = Requirement(name="c", quantity="cost", limit=0.0, method="clustered_t")
TRUTH = Requirement(name="true c", quantity="truth", limit=0.0, method="prediction_powered")


def labels_of(frame: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Labels of rows of a table that `save` wrote, with their prompts and answers."""
    prompts = [question(NUMBERS[name]) for name in frame["prompt_id"]]
    return frame.assign(prompt=prompts, response=[f"answer {row}" for row in rows])


@pytest.fixture
def labelled(tmp_path: Path) -> Callable[[str], Evidence]:
    """Candidates of mean -2 and -1 whose true cost is the model's, and 1.5 more for the bolder one;
    30 labels each.
    """

    def evidence(name: str) -> Evidence:
        mean, bias = {"safe": (-2.0, 0.0), "flattered": (-1.0, 1.5)}[name]
        costs, prompts = answers(mean)
        first = np.arange(0, 90, 3)
        noise = 0.1 * np.random.default_rng(1).normal(size=len(first))
        frame = pd.DataFrame(
            {
                "prompt_id": prompts[first],
                "cost": costs[first],
                "truth": costs[first] + bias + noise,
            }
        )
        write_parquet(tmp_path / f"{name}-labels.parquet", labels_of(frame, first), LABELS)
        return Evidence(
            save(tmp_path / f"{name}.parquet", costs, prompts), tmp_path / f"{name}-labels.parquet"
        )

    return evidence


def test_the_statement_rounds_no_bound_to_the_other_side_of_its_limit(tmp_path: Path) -> None:
    required = MODEL.model_copy(update={"limit": -0.25})
    costs, prompts = answers(-1.0)
    shift = -0.25 - upper_bound(costs, prompts)
    for off, told in ((-0.00002, "bound -0.25,"), (0.00002, "bound -0.24998,")):
        table = save(tmp_path / "a.parquet", costs + shift + off, prompts)
        path = tmp_path / "certificate.json"
        found = certify(path, ["a"], {"a": Evidence(table)}.__getitem__, [required])
        assert told in found.statement


def test_a_candidate_must_keep_every_requirement(
    tmp_path: Path, labelled: Callable[[str], Evidence]
) -> None:
    """The model's cost alone certifies both; the truth of thirty labels refuses the one that the
    model flatters.
    """
    path = tmp_path / "certificate.json"
    names = ["safe", "flattered"]
    assert certify(path, names, labelled, [MODEL]).certified == ("safe", "flattered")
    found = certify(path, names, labelled, [MODEL, TRUTH])
    assert found.certified == ("safe",) and found.returned == "safe"
    assert [check.kept for check in found.tested[1].checks] == [True, False]
    assert found.statement.startswith("'safe' keeps E[c] <= 0 (clustered_t bound -1.9")
    assert "and E[true c] <= 0 (prediction_powered bound -1.9" in found.statement
    costs, prompts = answers(-1.0)
    truth = pd.read_parquet(tmp_path / "flattered-labels.parquet")
    bound = corrected_upper_bound(costs, prompts, truth["cost"], truth["truth"], truth["prompt_id"])
    assert found.tested[1].checks[1].bound == bound > 0
    rectified = (
        truth["truth"].mean() + costs.mean() - truth["cost"].mean()
    )  # the model differs by a constant: weight 1
    assert found.tested[1].checks[1].estimate == pytest.approx(rectified, abs=0.02)
    assert verify(path) == found


@pytest.mark.parametrize(("harm_of_all", "bound"), [(0.0, 1 - 0.05 ** (1 / 20)), (1.0, 1.0)])
def test_labels_of_one_kind_have_the_exact_bound(
    tmp_path: Path, harm_of_all: float, bound: float
) -> None:
    """0 of 20 prompts: 1 - 0.05^(1/20). Where all are harmful the policy is not certified, and the
    stage goes on to say so.
    """
    costs, prompts = answers(-2.0)
    frame = pd.DataFrame({"prompt_id": prompts[:60:3], "cost": costs[:60:3], "truth": harm_of_all})
    write_parquet(tmp_path / "labels.parquet", labels_of(frame, np.arange(0, 60, 3)), LABELS)
    files = Evidence(
        save(tmp_path / "answers.parquet", costs, prompts), tmp_path / "labels.parquet"
    )
    harm = Requirement(
        name="called unsafe", quantity="harm", limit=0.15, method="prediction_powered"
    )
    found = certify(tmp_path / "certificate.json", ["a"], lambda name: files, [MODEL, harm])
    check = found.tested[0].checks[1]
    assert (check.estimate, check.bound) == (harm_of_all, pytest.approx(bound))
    assert found.returned == ("a" if harm_of_all == 0 else None)
    assert verify(tmp_path / "certificate.json") == found


def test_an_answer_without_a_label_is_not_harmless(tmp_path: Path) -> None:
    """Where all labels beside it were 0, the empty one counted as one more of them."""
    costs, prompts = answers(-1.0, 20)
    frame = pd.DataFrame({"prompt_id": prompts[::3], "cost": costs[::3], "truth": 0.0})
    labels = labels_of(frame, np.arange(20)).astype({"truth": object})
    labels.loc[5:, "truth"] = None
    write_parquet(tmp_path / "labels.parquet", labels, LABELS)
    files = Evidence(
        save(tmp_path / "answers.parquet", costs, prompts), tmp_path / "labels.parquet"
    )
    harm = Requirement(
        name="called unsafe", quantity="harm", limit=0.15, method="prediction_powered"
    )
    with pytest.raises(DataError, match=r"labels\.parquet: row 5 has no truth; label the answer"):
        certify(tmp_path / "certificate.json", ["a"], lambda name: files, [harm])


def test_no_unsafe_answer_has_the_exact_bound(tmp_path: Path) -> None:
    files = Evidence(save(tmp_path / "answers.parquet", *answers(-3.0)))
    rare = Requirement(name="rare", quantity="p_unsafe", limit=0.1, method="clustered_t")
    found = certify(tmp_path / "certificate.json", ["a"], lambda name: files, [rare])
    assert (
        found.tested[0].checks[0].bound == pytest.approx(1 - 0.05 ** (1 / 40))
        and found.returned == "a"
    )
    assert verify(tmp_path / "certificate.json") == found


def test_answers_that_all_ended_have_the_exact_bound(tmp_path: Path) -> None:
    """None of 20 even prompts has one that was cut, 2 of 20 odd ones have one."""
    files = Evidence(save(tmp_path / "answers.parquet", *answers(-3.0)))
    whole = Requirement(
        name="whole", quantity="unended", limit=0.2, method="clustered_t", prompts="even"
    )
    cut = whole.model_copy(update={"prompts": "odd"})
    found = certify(tmp_path / "certificate.json", ["a"], lambda name: files, [whole, cut])
    first, second = found.tested[0].checks
    assert (first.estimate, first.bound) == (0.0, pytest.approx(1 - 0.05 ** (1 / 20)))
    share = np.where(np.arange(20) < 2, 1 / 3, 0.0)
    assert (second.estimate, second.bound) == pytest.approx(
        (share.mean(), upper_bound(share, np.arange(20)))
    )
    assert verify(tmp_path / "certificate.json") == found


def test_answers_that_were_all_cut_fail_their_test(tmp_path: Path) -> None:
    costs, prompts = answers(-3.0)
    frame = pd.DataFrame({"prompt_id": prompts, "cost": costs, "length": 20, "ended": False})
    write_parquet(tmp_path / "cut.parquet", completed(frame), ANSWERS)
    whole = Requirement(name="whole", quantity="unended", limit=0.5, method="clustered_t")
    files = Evidence(tmp_path / "cut.parquet")
    found = certify(tmp_path / "certificate.json", ["a"], lambda name: files, [MODEL, whole])
    assert found.returned is None and (
        found.tested[0].checks[1].estimate,
        found.tested[0].checks[1].bound,
    ) == (1, 1)
    assert (
        "'a' is not shown to keep P(unended) <= 0.5 (clustered_t bound 1, 40 prompts), for"
        in found.statement
    )
    assert found.statement.endswith(
        "for answers of at most 20 tokens, of which 0 % ended by themselves"
    )


def test_labels_belong_to_the_certificate(
    tmp_path: Path, labelled: Callable[[str], Evidence]
) -> None:
    path = tmp_path / "certificate.json"
    certify(path, ["safe"], labelled, [MODEL, TRUTH])
    content = read_json(path)
    (tmp_path / "safe-labels.parquet").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"the labels of 'safe' .* are not those certified: sha256 differs"
    ):
        verify(path)
    write_json(path, {**content, "labels": {}})
    with pytest.raises(
        DataError,
        match="candidate 'safe': true c needs labels of its answers, and none are recorded",
    ):
        verify(path)


def test_the_command_looks_at_every_certificate_of_the_pipeline(
    tmp_path: Path,
    tables: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["verify"]) == 1
    assert "holds no certificate; run the stage certify first" in capsys.readouterr().out
    for name, limit, status in (("a", 0.0, 0), ("b", -3.0, 4)):
        issue(certificate.CERTIFICATES / name / certificate.FILE, tables, limit)
        assert command.main(["verify"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == [
        f"{certificate.CERTIFICATES}/{k}/certificate.json" for k in "ab"
    ]


def test_every_quantity_is_the_mean_of_a_function_of_an_answer(tmp_path: Path) -> None:
    """Against bounds of the same means by hand; a CVaR needs a level and its threshold."""
    costs, prompts = answers(-0.5, prompts=60)
    files = Evidence(save(tmp_path / "answers.parquet", costs, prompts))
    odd = np.array([NUMBERS[name] % 2 == 1 for name in prompts])
    by_hand = {
        "short": upper_bound(np.where(odd, 20, 10), prompts),
        "rare": upper_bound(costs > 0, prompts, method="betting", bounds=(0.0, 1.0)),
        "tail": upper_bound(0.1 + np.maximum(costs - 0.1, 0) / 0.1, prompts),
        "group": upper_bound(costs[odd], prompts[odd]),
    }
    by_hand["whole"] = upper_bound(np.isin(np.arange(180), [3, 9]), prompts)
    limits = [
        Requirement(name="short", quantity="length", limit=17, method="clustered_t"),
        Requirement(name="rare", quantity="p_unsafe", limit=0.3, method="betting", bounds=(0, 1)),
        Requirement(
            name="tail", quantity="cvar", limit=1.0, method="clustered_t", level=0.9, threshold=0.1
        ),
        Requirement(name="group", quantity="cost", limit=0.0, method="clustered_t", prompts="odd"),
        Requirement(name="whole", quantity="unended", limit=0.1, method="clustered_t"),
    ]
    found = certify(tmp_path / "certificate.json", ["a"], lambda name: files, limits)
    assert {check.requirement: check.bound for check in found.tested[0].checks} == pytest.approx(
        by_hand
    )
    assert found.tested[0].checks[3].prompts == 30 and found.returned == "a"
    said = found.statement
    assert "E[length] <= 17" in said and "P(c > 0) <= 0.3" in said and "CVaR_0.9(c) <= 1" in said
    assert "E[group] <= 0 on prompts with 'odd'" in said and "P(unended) <= 0.1" in said
    assert verify(tmp_path / "certificate.json") == found
    nowhere = Requirement(
        name="none", quantity="cost", limit=0.0, method="clustered_t", prompts="missing"
    )
    with pytest.raises(
        DataError, match="candidate 'a': none: 'missing' is found in no certify prompt"
    ):
        certify(tmp_path / "other.json", ["a"], lambda name: files, [nowhere])


# --- forgeries ------------------------------------------------------------------------------------


@pytest.fixture
def forge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Issues a certificate for tables with a library that does not look at them, as a forger's
    would.
    """

    def forged(tables: dict[str, Path], **options: Any) -> Path:
        with monkeypatch.context() as patched:
            patched.setattr(certificate, "agreed", lambda used, *_: (dict.fromkeys(used, 3), ()))
            issue(tmp_path / "reports" / "certificate.json", tables, 0.0, **options)
        return tmp_path / "reports" / "certificate.json"

    return forged


def rewrite(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    write_parquet(path, change(evidence.read_answers(path)), ANSWERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[rows["cost"] < -0.5],
            r"prompt [0-9a-f]{16} has \d answers and others have 3",
        ),
        (
            lambda rows: rows.assign(
                prompt_id=[f"{row:016x}" for row in range(len(rows))], sample=0
            ),
            "row 0: prompt_id 0{16} is not that of its prompt",
        ),
        (lambda rows: rows.assign(prompt=[user("hello")] * len(rows)), "is not that of its prompt"),
        (lambda rows: rows.assign(sample=0), "row 1: sample 0 is not one of 0 to 2"),
        (lambda rows: rows.assign(sample=rows["sample"] + 1), "sample 3 is not one of 0 to 2"),
        (
            lambda rows: rows.assign(length=5, ended=True),
            r"row 0: length 5, but the answer has \d+ tokens",
        ),
        (
            lambda rows: rows[rows["prompt_id"] > "4"],
            "'safest' and 'middle' have answers to different prompts",
        ),
        (
            lambda rows: rows[rows["sample"] < 2],
            "'middle' has 2 answers to each prompt, and 3 are stated",
        ),
    ],
)
def test_answers_that_cannot_have_been_drawn_so_are_named(
    forge: Callable[..., Path],
    tables: dict[str, Path],
    change: Callable[[pd.DataFrame], pd.DataFrame],
    message: str,
) -> None:
    rewrite(tables["middle"], change)
    with pytest.raises(DataError, match=message):
        verify(forge(tables))
    with pytest.raises(DataError, match=message):  # nor are they issued
        issue(tables["middle"].with_name("certificate.json"), tables, 0.0)


def test_prompts_that_were_left_out_of_all_tables_are_missed_beside_the_prompts(
    forge: Callable[..., Path], tables: dict[str, Path], tmp_path: Path
) -> None:
    prompts = [
        {"prompt_id": name, "prompt": question(number), "source": "x"}
        for name, number in NUMBERS.items()
    ]
    write_parquet(tmp_path / "certify.parquet", prompts, PROMPTS)
    for table in tables.values():
        rewrite(table, lambda rows: rows[rows["prompt_id"] > "4"])
    origin = origin_of(tmp_path, ["alone"])
    path = forge({"alone": tables["safest"]}, origin=origin)
    with pytest.raises(
        DataError,
        match=r"the answers are not to the first \d+ prompts of .*certify.parquet: \d+ are oth",
    ):
        verify(path)
    write_parquet(tmp_path / "certify.parquet", prompts[:5], PROMPTS)
    with pytest.raises(
        DataError,
        match=r"its prompts \(.*certify.parquet\) are not those certified: sha256 differs",
    ):
        verify(path)


def origin_of(root: Path, order: list[str], weights: tuple[float, ...] = (1.0,)) -> Origin:
    """Folders of models with a file each; the first candidate is the fallback, the last the
    policy.
    """
    for name in (*order, "cost_model", "certified"):
        (root / "models" / name).mkdir(parents=True, exist_ok=True)
        if not (root / "models" / name / "model.safetensors").is_file():
            (root / "models" / name / "model.safetensors").write_text(name)
    if not (root / "dual.json").is_file():
        write_json(root / "dual.json", solved(limit=0.0))
    folder = root / "models"
    return Origin(
        place=root / "reports",
        plan=CertifyRun(policy=order[-1], partner="sft", fallback=order[0], weights=list(weights)),
        prompts=root / "certify.parquet",
        limits=root / "dual.json",
        model=lambda name: folder / name,
        policy=folder / "certified",
        cost_model=folder / "cost_model",
    )


@pytest.fixture
def planned(tmp_path: Path, tables: dict[str, Path]) -> Path:
    """A certificate of the fallback `safest` and the policy `middle` with all that it was made from
    beside it.
    """
    prompts = [
        {"prompt_id": name, "prompt": question(number), "source": "x"}
        for name, number in NUMBERS.items()
    ]
    write_parquet(tmp_path / "certify.parquet", prompts, PROMPTS)
    origin = origin_of(tmp_path, ["safest", "middle"])
    both = {name: tables[name] for name in ("safest", "middle")}
    found = issue(tmp_path / "reports" / "certificate.json", both, 0.0, origin=origin)
    assert found.returned == "middle"
    (tmp_path / "models/certified/model.safetensors").write_text("middle")
    (tmp_path / "models/certified/README.md").write_text("written after the certificate")
    return tmp_path / "reports" / "certificate.json"


def test_what_it_was_made_from_is_compared_where_it_is_there(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = checked(planned, capsys)
    assert status == 0 and "not compared" not in line
    shutil.rmtree(tmp_path / "models/certified")
    assert checked(planned, capsys)[1].endswith(
        "not compared, since not there: the certified policy\n"
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "model.safetensors",
            r"the policy 'middle' \(.*certified\) is not the one certified: model.* was changed",
        ),
        ("more.safetensors", "more.safetensors was added"),
    ],
)
def test_another_policy_is_refused(planned: Path, tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / "models/certified" / file).write_text("other")
    with pytest.raises(DataError, match=message):
        verify(planned)
    (tmp_path / "models/certified/model.safetensors").unlink()
    with pytest.raises(DataError, match=r"more.safetensors was added|model.safetensors is missing"):
        verify(planned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["plan"].update(weights=[1.2, 1.0]),
            r"candidates are .*, but the plan has \['safest', 'middle at 1.2",
        ),
        (lambda c: c["plan"].update(fallback="other"), "the plan has .'other', 'middle'"),
        (lambda c: c["plan"].update(weights=[1.0, 1.2]), "plan: value error, weights must fall"),
        (
            lambda c: c["weights"].pop("safest"),
            "weights are those of .'middle'., but .'middle', 'safest'. were tested",
        ),
        (
            lambda c: c["weights"].update(middle=c["weights"]["safest"]),
            "is not the one certified: model.safetensors was changed",
        ),
        (
            lambda c: c["requirements"][0].update(limit=-0.05),  # no verdict changes
            "the limit 'c' of .*dual.json is not among the requirements as it stands there",
        ),
    ],
)
def test_a_plan_is_tested_whole(
    planned: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(change)(planned)
    with pytest.raises(DataError, match=message):
        verify(planned)


def test_it_is_written_elsewhere_and_put_in_its_place(
    tmp_path: Path, tables: dict[str, Path], planned: Path
) -> None:
    """As by a stage: what it was made from is recorded as it will be seen, the answers beside it as
    they are.
    """
    before = planned.read_bytes()
    elsewhere = tmp_path / "a" / "b" / "certificate"
    shutil.copytree(planned.parent, elsewhere)
    both = {name: elsewhere / name / "answers.parquet" for name in ("safest", "middle")}
    issue(elsewhere / planned.name, both, 0.0, origin=origin_of(tmp_path, list(both)))
    assert (elsewhere / planned.name).read_bytes() == before


def test_every_additional_constraint_is_required(
    tmp_path: Path, tables: dict[str, Path], planned: Path
) -> None:
    """A certificate that leaves a limit of the solved dual out, or loosens it, does not hold."""
    known = {
        "name": "rare",
        "quantity": "p_unsafe",
        "limit": 0.2,
        "level": None,
        "prompts": None,
        "threshold": None,
    }
    write_json(tmp_path / "dual.json", solved(limit=0.0, prices=[known]))
    rare = Requirement(**known, method="star_bets", bounds=(0.0, 1.0))
    cost = Requirement(name="c", quantity="cost", limit=0.0, method="clustered_t")
    names = ["safest", "middle"]
    origin = origin_of(tmp_path, ["safest", "middle"])
    for required, holds in (
        ([cost, rare], True),
        ([cost], False),
        ([cost, rare.model_copy(update={"limit": 0.3})], False),
    ):
        certify(planned, names, lambda name: Evidence(tables[name]), required, origin=origin)
        if holds:
            assert verify(planned).returned == "middle"
            continue
        with pytest.raises(
            DataError, match=r"the limit 'rare' of .*dual.json is not among the requirements"
        ):
            verify(planned)
    write_json(tmp_path / "dual.json", solved())
    with pytest.raises(DataError, match=r"its limits \(.*dual.json\) are not those certified"):
        verify(planned)


def test_where_no_policy_is_certified_none_may_lie_there(
    tmp_path: Path, tables: dict[str, Path], planned: Path
) -> None:
    only = {"safest": tables["safest"]}
    write_json(tmp_path / "dual.json", solved(limit=-3.0))
    issue(planned, only, -3.0, origin=origin_of(tmp_path, ["safest"]))
    with pytest.raises(
        DataError,
        match=r"no policy is certified, and what lies there .* model.safetensors was added",
    ):
        verify(planned)


def test_a_candidate_does_not_answer_for_another_in_silence(
    tables: dict[str, Path], planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Policies that hardly differ may answer alike by right, so that is said, and must be."""
    shutil.copyfile(tables["safest"], tables["middle"])
    both = {name: tables[name] for name in ("safest", "middle")}
    assert issue(planned, both, 0.0).same == (("safest", "middle"),)
    status, line = checked(planned, capsys)
    assert (
        status == 0
        and "'safest' and 'middle' have the same answers: they hardly differ, or one was copied"
        in line
    )
    edit(lambda content: content.update(same=[]))(planned)
    with pytest.raises(
        DataError, match=r"same answers are \[\('safest', 'middle'\)\], and \[\] are stated"
    ):
        verify(planned)


def test_labels_of_other_answers_are_refused(
    tmp_path: Path, labelled: Callable[[str], Evidence]
) -> None:
    files = labelled("safe")
    assert files.labels is not None
    labels = evidence.read_labels(files.labels)
    for change, message in (
        ({"response": "another"}, "the labelled answer to .* is none of the candidate's answers"),
        ({"prompt": [user("hello")] * len(labels)}, "is not that of its prompt"),
    ):
        write_parquet(files.labels, labels.assign(**change), LABELS)
        with pytest.raises(DataError, match=message):
            certify(tmp_path / "certificate.json", ["safe"], lambda name: files, [MODEL, TRUTH])


def test_columns_of_another_type_are_named(
    tmp_path: Path, tables: dict[str, Path], issued: Path
) -> None:
    """Texts and numbers of another width are read; so pandas may have written the file."""
    whole = pd.read_parquet(tables["middle"])
    nothing = [None] * len(whole)
    for change, message in (
        ({}, None),
        ({"cost": "cheap"}, "column 'cost' holds texts, not numbers"),
        ({"ended": nothing}, "column 'ended' holds null, not flags"),
        ({"prompt": "hello"}, "column 'prompt' holds texts, not lists of turns"),
        ({"length": [None, *whole["length"][1:]]}, "row 0 has no length"),
        (
            {"prompt": [[{"role": None, "content": "x"}]] * len(whole)},
            "row 0: a turn of the prompt has no role",
        ),
    ):
        whole.assign(**change).to_parquet(tables["middle"])
        digest = {"sha256": sha256(tables["middle"])}
        content = read_json(issued)
        write_json(
            issued,
            {
                **content,
                "tables": {**content["tables"], "middle": content["tables"]["middle"] | digest},
            },
        )
        if message is None:
            assert verify(issued).returned == "middle"
            continue
        with pytest.raises(DataError, match=message):
            verify(issued)


def test_a_bound_that_is_not_finite_is_named(planned: Path) -> None:
    edit(lambda c: c.update(delta=1e-320))(planned)
    with pytest.raises(DataError, match="finite number"):
        verify(planned)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values of a JSON file, the containers included."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield (*path, key)
        yield from leaves(item, (*path, key))


@pytest.mark.parametrize(
    "value", [None, [], {}, "x", "", -1, 0, 1e308, True, [[]], {"a": 1}], ids=repr
)
def test_no_value_of_a_certificate_ends_in_a_traceback(planned: Path, value: Any) -> None:
    """Whatever is put in place of any value, the certificate holds, or one error says why not."""
    content = read_json(planned)
    for path in leaves(content):
        changed = json.loads(json.dumps(content))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        planned.write_text(json.dumps(changed))
        try:
            absent(planned, verify(planned))
        except DualignError as error:
            assert "\n" not in str(error), path


# --- answers that another policy drew -------------------------------------------------------------


def test_the_weighted_value_has_the_candidates_mean_by_every_answer_there_is() -> None:
    """Three prompts of five answers each, all summed up: E_drawn[d + w (c - d)] is E_pi[c] for
    every limit d.
    """
    rng = np.random.default_rng(0)
    drew = rng.dirichlet(np.ones(5), 3)
    own = rng.dirichlet(np.ones(5), 3)
    costs = rng.normal(size=(3, 5))
    for limit in (-1.0, 0.0, 2.5):
        needed = MODEL.model_copy(update={"limit": limit})
        value = needed.weighted(costs, own / drew)
        assert (drew * value).sum(1) == pytest.approx((own * costs).sum(1))


TILTS = {"gentle": 0.0, "bolder": 0.3, "boldest": 3.0}


def tilted(file: Path, tilt: float, costs: np.ndarray, prompts: np.ndarray) -> Path:
    """Answers that a policy drew with log-probability -2, as a tilt by their standardised costs has
    them.
    """
    save(file, costs, prompts)
    z = (costs - costs.mean()) / costs.std()
    frame = pd.read_parquet(file).assign(logp=-2.0 + tilt * z - tilt**2 / 2, logp_drawn=-2.0)
    write_parquet(file, frame, REWEIGHTED)
    return file


@pytest.fixture
def path(tmp_path: Path) -> Callable[[str], Evidence]:
    """A path of tilts by one draw of mean cost -0.5, with a label of the truth, 0.1 above, for 30
    prompts.
    """

    def evidence(name: str) -> Evidence:
        costs, prompts = answers(-0.5)
        first = np.arange(0, 90, 3)
        noise = 0.1 * np.random.default_rng(1).normal(size=len(first))
        frame = pd.DataFrame(
            {"prompt_id": prompts[first], "cost": costs[first], "truth": costs[first] + 0.1 + noise}
        )
        write_parquet(tmp_path / f"{name}-labels.parquet", labels_of(frame, first), LABELS)
        file = tilted(tmp_path / f"{name}.parquet", TILTS[name], costs, prompts)
        return Evidence(file, tmp_path / f"{name}-labels.parquet")

    return evidence


def test_one_draw_and_its_labels_serve_a_path(
    tmp_path: Path, path: Callable[[str], Evidence]
) -> None:
    file = tmp_path / "certificate.json"
    found = certify(file, list(TILTS), path, [MODEL, TRUTH])
    assert found.certified == ("gentle", "bolder") and found.tested[0].ess == pytest.approx(1.0)
    ess = [test.ess or 0.0 for test in found.tested]
    assert ess == sorted(ess, reverse=True) and ess[2] < 0.3
    costs, prompts = answers(-0.5)
    z = (costs - costs.mean()) / costs.std()
    weight = np.exp(0.3 * z - 0.045)
    model, truth = found.tested[1].checks
    assert model.bound == pytest.approx(upper_bound(weight * costs, prompts))
    told = pd.read_parquet(tmp_path / "bolder-labels.parquet")
    own = weight[:90:3]
    bound = corrected_upper_bound(
        weight * costs,
        prompts,
        own * told["cost"],
        own * told["truth"],
        told["prompt_id"].to_numpy(),
    )
    assert truth.bound == pytest.approx(bound)
    assert verify(file) == found


def test_answers_that_are_worth_little_certify_nothing(
    tmp_path: Path, path: Callable[[str], Evidence]
) -> None:
    """By its weights the boldest has a mean cost far below the limit, and a bound too; nobody drew
    what it does.
    """
    costs, prompts = answers(-0.5)
    tilted(tmp_path / "boldest.parquet", -3.0, costs, prompts)
    only = Evidence(tmp_path / "boldest.parquet")
    found = certify(
        tmp_path / "certificate.json",
        ["boldest"],
        lambda name: only,
        [MODEL.model_copy(update={"limit": 9.0})],
    )
    (test,) = found.tested
    assert test.ess is not None and test.ess < 0.8 and test.checks[0].bound < 9.0
    assert not test.checks[0].kept and found.returned is None
    assert verify(tmp_path / "certificate.json") == found


def test_at_the_policy_that_drew_nothing_changes(
    tmp_path: Path, path: Callable[[str], Evidence]
) -> None:
    """With weights of 1 a test is that of the answers as they are."""
    found = certify(tmp_path / "certificate.json", ["gentle"], path, [MODEL, TRUTH])
    save(tmp_path / "gentle.parquet", *answers(-0.5))
    plain = Evidence(tmp_path / "gentle.parquet", tmp_path / "gentle-labels.parquet")
    again = certify(tmp_path / "plain.json", ["gentle"], lambda name: plain, [MODEL, TRUTH])
    for one, other in zip(found.tested[0].checks, again.tested[0].checks, strict=True):
        assert one.bound == pytest.approx(other.bound) and one.estimate == pytest.approx(
            other.estimate
        )
    assert found.ended == pytest.approx(again.ended)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda frame: frame.assign(logp_drawn=-2.1),
            "'gentle' and 'bolder' are judged by answers that another poli",
        ),
        (
            lambda frame: frame.assign(logp=np.nan),
            "row 0 has no weight: logp and logp_drawn must be finite",
        ),
        (lambda frame: frame.assign(logp=1e4), "row 0 has no weight"),
    ],
)
def test_weights_of_no_common_draw_are_refused(
    tmp_path: Path,
    path: Callable[[str], Evidence],
    change: Callable[[pd.DataFrame], pd.DataFrame],
    message: str,
) -> None:
    def evidence(name: str) -> Evidence:
        files = path(name)
        if name == "bolder":
            write_parquet(files.answers, change(pd.read_parquet(files.answers)), REWEIGHTED)
        return files

    with pytest.raises(DataError, match=message):
        certify(tmp_path / "certificate.json", list(TILTS), evidence, [MODEL])


@pytest.mark.parametrize(
    "needed",
    [
        Requirement(name="rare", quantity="p_unsafe", limit=0.9, method="clustered_t"),
        Requirement(name="c", quantity="cost", limit=0.0, method="star_bets", bounds=(-4.0, 4.0)),
    ],
)
def test_shares_and_ranges_take_no_weighted_answers(
    tmp_path: Path, path: Callable[[str], Evidence], needed: Requirement
) -> None:
    """A weighted value has no range, and where no answer is unsafe its spread says nothing of those
    that are.
    """
    with pytest.raises(DataError, match="takes no answers that another policy drew"):
        certify(tmp_path / "certificate.json", ["gentle"], path, [needed])


def test_a_certificate_of_before_screens_still_holds(issued: Path) -> None:
    """One that was written without the keys of screens and weights."""
    content = read_json(issued)
    for key in ("screen", "drawn"):
        content.pop(key)
    for test in content["tested"]:
        test.pop("ess")
    write_json(issued, content)
    assert verify(issued).returned == "middle"
