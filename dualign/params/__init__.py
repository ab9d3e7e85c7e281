"""Every knob, typed: one frozen class per stage.

`params.yaml` has shared keys (`seed`, `beta`, `constraint`, `generation`) and one section per
stage; a class declares in `shared` which of the shared keys its stage reads. A stage cannot read
what it does not declare, and `dvc.yaml` lists exactly that. The section `resources` says how to run
(batch sizes, devices, logging); it changes no result beyond rounding and the random draw, so DVC
does not track it.

Types, validators and the reading of the file, nothing that computes: DVC tracks the values that a
stage reads, so an edit here makes no stage stale.
"""
