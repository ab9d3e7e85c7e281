"""An old params file gets one line that says what each key is called now."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dualign.core.errors import ParamsError
from dualign.params.loading import check
from dualign.params.renamed import renamed_keys

Content = dict[str, Any]


def test_an_old_file_is_told_every_new_word_in_one_line(content: Content) -> None:
    old = copy.deepcopy(content)
    old["constraint"]["also"] = old["constraint"].pop("additional")
    old["methods"]["dualign"]["aims"] = "stock"
    run = old["lagrangian_dpo"]["runs"]["anchored"]
    run["inner"] = run.pop("pair_loss")
    old["safety_dpo"]["runs"]["stepwise"]["lam"] = "stock"
    with pytest.raises(ParamsError) as refused:
        check(old, "old.yaml")
    message = str(refused.value)
    assert message.startswith("old.yaml: is of an earlier dualign: ") and "\n" not in message
    for words in (
        "constraint.also is now constraint.additional",
        "methods.dualign.aims is now methods.dualign.target",
        "lagrangian_dpo.runs.anchored.inner is now lagrangian_dpo.runs.anchored.pair_loss",
        "safety_dpo.runs.stepwise.lam: stock is now safety_dpo.runs.stepwise.lam: margin",
    ):
        assert words in message


def test_the_shipped_file_has_no_old_word(content: Content) -> None:
    assert not renamed_keys(content)
