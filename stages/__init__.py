"""The stages of dvc.yaml, one script each: `python -m stages.NAME [ITEM]`.

Settings that must stand before the heavy libraries are imported are made here, where every stage
passes first."""

from __future__ import annotations

import gc
import os
import sys

# OpenMP threads that wait spin only briefly: with another process on the cores, spinning is several
# times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# While a stage imports, nothing of what it makes is garbage, and looking for some takes a fifth of
# the time. `dualign.stage.execute` begins the search again. A library that imports a stage is left
# alone: argv is "-m" only while Python looks for what `python -m` names.
if sys.argv[0] == "-m":
    gc.disable()
