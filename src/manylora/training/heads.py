"""What a base is loaded as: a language model's head over the vocabulary, or a classifier's over labels.

The one place that reads PEFT's task type of a base; what it means for rows, losses and answers is `training.kinds`.

Shape letters: B rows, T tokens, V vocabulary, C labels.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from manylora.errors import ModelError
from manylora.files import read_json, reason

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


POOLING = Path("1_Pooling") / "config.json"
"""Where sentence-transformers says how tokens become one vector."""


class Head(abc.ABC):
    """What distinguishes bases of one task type."""

    loader: ClassVar[Any]
    """transformers' class of such models."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Keywords of a forward pass in training."""

    @abc.abstractmethod
    def check(self, config: PretrainedConfig, *, model: str) -> None:
        """Refuse an architecture that cannot have this head.

        Raises:
            ModelError: naming the model and its type.
        """

    @abc.abstractmethod
    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, *, rows: int | None, model: str) -> None:
        """Refuse a tokenizer without the special tokens that are needed.

        Args:
            tokenizer: the base's.
            rows: of the model's embedding; None: not known.
            model: for the error.

        Raises:
            ModelError: it lacks one.
        """

    @abc.abstractmethod
    def shadow(
        self,
        architecture: PretrainedConfig,
        *,
        location: str,
        labels: int,
        dtype: torch.dtype,
        **options: Any,
    ) -> PreTrainedModel:
        """The base, on whatever device is torch's default, without its weights.

        Args:
            architecture: of the base.
            location: its folder.
            labels: C, where there is a head over labels.
            dtype: of the weights.
            options: further ones of `from_config`.
        """

    def parts(self, base: PreTrainedModel) -> list[str]:
        """The children of a base that are its head and no part of the pretrained model."""
        return []

    @abc.abstractmethod
    def bare(
        self, config: PeftConfig, weights: Mapping[str, Tensor]
    ) -> tuple[PeftConfig, Mapping[str, Tensor]]:
        """An adapter's settings and weights without what only a trained head tells; changes `config`."""

    @abc.abstractmethod
    def sample_loss(self, logits: Tensor, *, answer: int) -> Tensor:
        """The trainer's loss of equal rows, without an operation whose shapes depend on data.

        Args:
            logits: (B, T, V) or (B, C).
            answer: tokens at the end of a row that count, where tokens do.
        """


class LanguageHead(Head):
    """Over the vocabulary: the model writes."""

    loader = AutoModelForCausalLM
    options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def check(self, config: PretrainedConfig, *, model: str) -> None:
        """See `Head`; an encoder would see the answer that it should write."""
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ModelError(
                f"{model} is of type {config.model_type!r}, which has no causal language model; "
                "give a decoder such as Llama, Qwen, Mistral, Gemma, Phi, GPT-2 or GPT-NeoX."
            )
        reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
        if reads_both_ways and not getattr(config, "is_decoder", True):
            raise ModelError(
                f"{model} is an encoder ({config.model_type!r}), which sees the answer that it should write; give a "
                "decoder, or train it to choose among labels (--task-type SEQ_CLS)."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, *, rows: int | None, model: str) -> None:
        """See `Head`: an end token, which the model can embed."""
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                f"The tokenizer of {model} has no end-of-sequence token, so an answer could never end."
            )
        if rows is not None and eos >= rows:
            raise ModelError(
                f"The tokenizer of {model} ends answers with {tokenizer.eos_token!r} (id {eos}), but the model has "
                f"rows for {rows} tokens; give the tokenizer that belongs to the model."
            )

    def shadow(
        self,
        architecture: PretrainedConfig,
        *,
        location: str,
        labels: int,
        dtype: torch.dtype,
        **options: Any,
    ) -> PreTrainedModel:
        """See `Head`."""
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype, **options)

    def bare(
        self, config: PeftConfig, weights: Mapping[str, Tensor]
    ) -> tuple[PeftConfig, Mapping[str, Tensor]]:
        """See `Head`: all."""
        return config, weights

    def sample_loss(self, logits: Tensor, *, answer: int) -> Tensor:
        """See `Head`."""
        rows, length = logits.shape[:2]
        answer = min(answer, length - 1)
        row = torch.arange(rows).repeat_interleave(answer)
        place = torch.arange(length - 1 - answer, length - 1).repeat(rows)
        counted = logits[:, :-1][row, place].float()
        return F.cross_entropy(counted, torch.zeros_like(row), reduction="none").sum()


class LabelHead(Head):
    """Over labels: the model chooses."""

    loader = AutoModelForSequenceClassification

    def check(self, config: PretrainedConfig, *, model: str) -> None:
        """See `Head`."""
        if type(config) not in AutoModelForSequenceClassification._model_mapping:
            raise ModelError(
                f"{model} is of type {config.model_type!r}, which has no sequence classification; give an encoder "
                "such as BERT, RoBERTa or DeBERTa, or a decoder such as Llama."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, *, rows: int | None, model: str) -> None:
        """See `Head`: any token to pad with."""
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise ModelError(
                f"The tokenizer of {model} has no padding token, so rows could not share a batch."
            )

    def shadow(
        self,
        architecture: PretrainedConfig,
        *,
        location: str,
        labels: int,
        dtype: torch.dtype,
        **options: Any,
    ) -> PreTrainedModel:
        """See `Head`."""
        architecture.num_labels = labels
        if architecture.pad_token_id is None:
            architecture.pad_token_id = 0
        base = AutoModelForSequenceClassification.from_config(architecture, dtype=dtype, **options)
        pool_as_told(base, location)
        return base

    def parts(self, base: PreTrainedModel) -> list[str]:
        """What stands beside the encoder or decoder and has weights ("classifier", "score")."""
        return [
            name
            for name, child in base.named_children()
            if name != base.base_model_prefix and any(True for _ in child.parameters())
        ]

    def bare(
        self, config: PeftConfig, weights: Mapping[str, Tensor]
    ) -> tuple[PeftConfig, Mapping[str, Tensor]]:
        """See `Head`: the head's size follows the number of labels, which a file alone does not tell."""
        config.task_type, config.modules_to_save = None, None
        return config, {key: value for key, value in weights.items() if ".lora_" in key}

    def sample_loss(self, logits: Tensor, *, answer: int) -> Tensor:
        """See `Head`: one label each."""
        return F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long))


LANGUAGE, LABEL = LanguageHead(), LabelHead()


def head_of(task_type: str | None) -> Head:
    """The head of bases of a task type, in PEFT's words; a language model's where it names another or none."""
    return LABEL if task_type == "SEQ_CLS" else LANGUAGE


class MeanPooler(nn.Module):
    """The mean over a row's real tokens, in place of a BERT's pooler; B rows, T tokens, D wide."""

    def __init__(self) -> None:
        super().__init__()
        self._mask: Tensor | None = None

    def read_mask(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the encoder: note the running call's attention mask."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states to (B, D)."""
        mask, self._mask = self._mask, None
        if mask is None:
            return hidden_BTD.mean(1)
        real_BT1 = mask.to(hidden_BTD.dtype)[..., None]
        return (hidden_BTD * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)


def pool_as_told(model: PreTrainedModel, location: str) -> None:
    """Let a classifier read the mean of the tokens where its folder, by sentence-transformers' file, says that this is
    the encoder's vector.

    A BERT classifier reads the first token. An encoder that was trained for the mean of its tokens keeps little there:
    on 300 questions of TREC's six kinds a linear probe of all-MiniLM-L6-v2 is right on 33 % of 200 test rows by the
    first token's vector, and on 62 % by the mean.

    Changes models whose encoder has a pooler of its own (BERT, MPNet, …); others stay as they are.

    Raises:
        ModelError: what the folder says is damaged.
    """
    told = Path(location) / POOLING
    if not told.is_file() or not isinstance(getattr(model.base_model, "pooler", None), nn.Module):
        return
    try:
        settings = read_json(told)
    except (OSError, ValueError) as error:
        raise ModelError(f"{told} cannot be read ({reason(error)}); put a copy of it back.") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{told} holds no settings; put a copy of it back.")
    if settings.get("pooling_mode_mean_tokens") or settings.get("pooling_mode") == "mean":
        pooler = MeanPooler()
        model.base_model.pooler = pooler
        model.base_model.register_forward_pre_hook(pooler.read_mask, with_kwargs=True)
