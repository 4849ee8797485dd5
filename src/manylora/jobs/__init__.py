"""The jobs: each is one file whose function takes a configuration and returns a typed result.

`train`, `evaluate`, `predict`, `export`, `federate`, `analyze` do what the command line's verbs of these names do, for
whoever calls them: the command line, Python (`import manylora`), studies. `session` is how a run begins, is held, goes
on and ends; `launch` are the processes of one run; `progress` is what a job tells on the way, `run` what is left;
`subject` is a trained model, ready to answer. Further files are parts of a job: `collapse` and `combine_loras` of
`export`, `measure` and `figures` of `analyze`, `flower` of `federate`.

A name is imported from its file: the configurations beside the jobs must not wait for torch, as `--help` reads them.
"""

__all__: list[str] = []
