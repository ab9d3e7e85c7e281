"""A model whose batches are not its own answers is refused before anything is drawn from it."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from dualign.core.errors import ModelError, ParamsError
from dualign.lm.engines.interface import Request
from dualign.lm.engines.table import ENGINES
from dualign.params.base import EngineName, Resources
from tests.lm.architectures import KEEPING, built

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("engine", ["refill", "continuous"])
@pytest.mark.parametrize("name", KEEPING)
def test_an_engine_refuses_a_state_that_it_cannot_hand_on(
    name: str, engine: EngineName, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> None:
    request = Request([[3, 4], [5]], [0, 1], 0, [2], 4, 2)
    with pytest.raises((ModelError, ParamsError), match=rf"^resources.engine {engine}: .*generate"):
        ENGINES[engine](built(KEEPING[name]), tokenizer, request, resources)
