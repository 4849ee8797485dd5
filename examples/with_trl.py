"""With TRL: a training of your own with SFTTrainer, which takes ManyLoraConfig as it takes PEFT's LoraConfig.

    python examples/with_trl.py [STEPS]

Needs TRL: pip install 'manylora[trl]'. More in docs/trl.md.
"""

import sys

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    sys.exit("skipped: TRL is not installed; pip install 'manylora[trl]'")
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora import ManyLoraConfig
from manylora.assets import embedded_base_path
from manylora.data import load_examples, prompt_text

OUT = "trl-adapter"


def main(steps: int = 100) -> None:
    """Train, save, load again."""
    base = embedded_base_path()  # any transformers model
    examples = load_examples("embedded", split="train", tasks=["former_owner", "story_sum"])
    rows = Dataset.from_list(
        [{"prompt": prompt_text(row), "completion": row.output} for own in examples.values() for row in own]
    )
    config = ManyLoraConfig(r=8, lora_alpha=16, num_experts=3, share="B", target_modules="all-linear")
    # Without a GPU: bf16=False, as TRL's default is bfloat16.
    settings = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=SFTConfig(OUT, max_steps=steps, learning_rate=5e-3, logging_steps=1, max_length=128, **settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config,
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model(OUT)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last")
    model = AutoPeftModelForCausalLM.from_pretrained(OUT)
    print(f"loaded again from {OUT}: {model.peft_config['default'].peft_type.value}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
