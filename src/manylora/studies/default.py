"""The study that `manylora compare` runs without a file."""

DEFAULT = """\
name: first-look
question: Which way of sharing does best on four tasks of the embedded suite?
caveat: Four of the suite's eight tasks with 60 training rows each, 3 epochs.
reference: alora
settings:
  tasks: [former_owner, current_holder, record_to_text, register_entry]
  limit: 60
  epochs: 3
methods: [lora, lora-matched, lora-per-task, hydralora, alora]
seeds: [0, 1]
"""
"""Small enough for two cores and ten minutes; a first look, not evidence."""
