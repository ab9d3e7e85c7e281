"""What a certificate requires of a candidate: the mean of a quantity of its answers within a limit.

A candidate may be judged by answers that another policy drew. With w = pi(y|x) / pi_drawn(y|x) and
E_drawn[w] = 1,

    E_drawn[d + w (c - d)] = E_pi[c],

so a bound of the mean of d + w (c - d), d the limit, is one of E_pi[c]: one draw serves a whole
path of policies, and the tests along it can be as dense as one likes. Near the limit c - d is
small, and so is what the weights add."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from pydantic import FiniteFloat, model_validator

from dualign.core.errors import DataError
from dualign.core.names import Pattern
from dualign.core.records import WholeRecord
from dualign.math.bounds import RANGED, Method
from dualign.math.constraints import Constraint
from dualign.params.base import SHARES, Quantity


class Requirement(WholeRecord):
    """What a candidate must keep: the mean of a quantity of its answers is at most `limit`.

    `cost`, `p_unsafe`, `cvar`, `length` and `unended` are those of `dualign.math.constraints`,
    tested by `method` on the prompts in which `prompts` is found (None: all); a bound on `cvar`
    holds for every `threshold` that was chosen before. Known for some answers and tested by
    `corrected_upper_bound` (`prediction_powered`): `truth`, the true cost, and `harm`, the share of
    people who call an answer harmful. `why` is the reason for the method, in words."""

    name: str
    quantity: Quantity | Literal["truth", "harm"]
    limit: FiniteFloat
    method: Method | Literal["prediction_powered"]
    bounds: tuple[FiniteFloat, FiniteFloat] | None = None
    level: FiniteFloat | None = None
    threshold: FiniteFloat | None = None
    prompts: Pattern | None = None
    why: str = ""

    @model_validator(mode="after")
    def _check(self) -> Requirement:
        if self.quantity == "cvar" and (
            self.threshold is None or self.level is None or not 0 <= self.level < 1
        ):
            raise ValueError(
                f"{self.name}: a cvar needs its threshold, and a level of at least 0 and below 1"
            )
        if self.bounds is None and self.method in RANGED:
            raise ValueError(
                f"{self.name}: method {self.method} needs bounds, the range of the quantity"
            )
        if (self.method == "prediction_powered") != (self.quantity in ("truth", "harm")):
            raise ValueError(f"{self.name}: {self.quantity} is not tested by {self.method}")
        return self

    def __str__(self) -> str:
        """The inequality, as a person reads it.

        >>> short = {"quantity": "length", "limit": 80, "method": "clustered_t"}
        >>> str(Requirement(name="c", prompts="[?]", **short))
        "E[length] <= 80 on prompts with '[?]'"
        """
        mean = {
            "p_unsafe": "P(c > 0)",
            "cvar": f"CVaR_{self.level}(c)",
            "length": "E[length]",
            "unended": "P(unended)",
        }.get(self.quantity, f"E[{self.name}]")
        if self.method == "clopper_pearson":
            mean = "P(unsafe answer to a prompt)"
        where = f" on prompts with {self.prompts!r}" if self.prompts else ""
        return f"{mean} <= {self.limit:g}{where}"

    @property
    def reweighs(self) -> bool:
        """Whether it takes answers of another policy: no range holds for a weighted value."""
        if self.method == "prediction_powered":
            return self.quantity == "truth"
        return self.method == "clustered_t" and self.bounds is None and self.quantity not in SHARES

    def weighted(self, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """d + w (v - d), d the limit: by the policy that drew, its mean is the candidate's of v.

        Twice as likely under the candidate, twice as far from the limit:

        >>> required = Requirement(name="c", quantity="cost", limit=1.0, method="clustered_t")
        >>> required.weighted(np.array([4.0, 0.5]), weight=np.array([2.0, 1.0]))
        array([7. , 0.5])
        """
        if not self.reweighs:
            raise DataError(
                f"{self.name}: {self.method} of {self.quantity} takes no answers that another"
                " policy drew"
            )
        weighed: np.ndarray = self.limit + weight * (values - self.limit)
        return weighed

    def values(self, answers: pd.DataFrame) -> pd.DataFrame:
        """Columns prompt_id and value of the answers it is about, weighed if others drew them.

        Raises DataError if there are none.
        """
        if self.quantity == "truth" or self.quantity == "harm":
            raise ValueError(f"{self.quantity} is known of labelled answers only")
        additional = Constraint(
            self.name, self.quantity, self.limit, self.level, self.prompts, self.threshold
        )
        rows = answers[additional.applies(answers["prompt"].tolist())] if self.prompts else answers
        if rows.empty:
            raise DataError(
                f"{self.name}: {self.prompts!r} is found in no certify prompt; keep more, or"
                " change it"
            )
        values = additional.values(
            *(rows[name].to_numpy(float) for name in ("cost", "length", "ended"))
        )
        if "weight" in rows:
            values = self.weighted(values, rows["weight"].to_numpy(float))
        return pd.DataFrame({"prompt_id": rows["prompt_id"].to_numpy(object), "value": values})
