"""The study that `manylora compare` runs without a file."""

DEFAULT = """\
name: first-look
question: Which way of sharing does best on four tasks of the embedded suite?
caveat: Four of the suite's eight tasks with 100 training and 100 test rows each, 4 epochs.
reference: alora
settings:
  tasks: [praised_thing, blamed_thing, former_owner, record_to_text]
  train_limit: 100
  limit: 100
  epochs: 4
methods: [lora, lora-matched, lora-per-task, hydralora, alora]
seeds: [0, 1]
"""
"""Small enough for two cores and ten minutes; a first look, not evidence."""
