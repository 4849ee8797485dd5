"""The studies room: a study is methods × seeds × tasks, run cell by cell, and tried with statistics.

`config` reads a study from YAML, `presets` names methods, `kinds` lists what can be a cell (`train_cells`,
`federated_cells`, `transfer_cells`) and `settings` what each may be told, `cells` says who cells are, `results` keeps
what they found, `costs` lists what they cost, `runner` runs them as processes, `summary` turns results into the numbers
and verdicts of `records`, `tables` shows these; `compare` does all of it for the verb.

A name is imported from its file, because torch and transformers take seconds and `--help` needs neither.
"""

__all__: list[str] = []
