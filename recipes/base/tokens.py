"""Byte-level BPE trained on the corpus, and documents packed into rows of token ids with loss weights."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from manylora.data.suite.lexicon import sentence
from recipes.base.corpus import Phase, documents, plain, spans
from recipes.base.words import COMMON

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '== ' + message['role'] + '\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '== assistant\n' }}{% endif %}"
)


def train_tokenizer(seed: int, vocab_size: int, count: int = 60_000) -> PreTrainedTokenizerFast:
    """Train on `count` documents of the corpus and a list of common words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Common words in the places where prompts have them, so that they are not spelt out letter by letter.
    extra = [f"{sentence(word)} {word} {sentence(word)}" for word in COMMON for _ in range(150)]
    extra += [
        f"### {word}: {word}:"
        for word in ("Instruction", "Response", "Input", "Note", "OPTIONS", "OPTIONS", "OPTIONS", "OPTIONS")
        for _ in range(1500)
    ]
    texts = [plain(document) for document in islice(documents(f"{seed}/tokenizer"), count)]
    tokenizer.train_from_iterator([*texts, *extra], trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=AddedToken(BOS, special=True, normalized=False),
        eos_token=AddedToken(EOS, special=True, normalized=False),
        pad_token=AddedToken(PAD, special=True, normalized=False),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class Rows(NamedTuple):
    """Whole documents side by side in rows of equal length; R rows, T tokens."""

    ids: torch.Tensor
    """(R, T) token ids, padded."""
    weights: torch.Tensor
    """(R, T) loss weights: 1 on marked text and end-of-text, 0 on begin-of-text and padding."""
    document: torch.Tensor
    """(R, T) which document of the row a token belongs to; -1 for padding."""
    position: torch.Tensor
    """(R, T) place within the document."""

    def pick(self, part: slice) -> Rows:
        return Rows(*(tensor[part] for tensor in self))


def attention_mask(rows: Rows) -> torch.Tensor:
    """(R, 1, T, T), additive: a token sees itself and what stands before it in its own document."""
    same = rows.document[:, :, None] == rows.document[:, None, :]
    length = rows.ids.shape[1]
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], context_weight: float
) -> list[tuple[list[int], list[float]]]:
    """Token ids and loss weights of marked documents."""
    batch = [spans(text) for text in texts]
    encoded = tokenizer.backend_tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
    coded = []
    for (_, marked), encoding in zip(batch, encoded, strict=True):
        weights = [0.0]
        place = 0
        for start, end in encoding.offsets:
            while place < len(marked) and marked[place][1] <= start:
                place += 1
            inside = place < len(marked) and end > marked[place][0]
            weights.append(1.0 if inside and start < end else context_weight)
        coded.append(([tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id], [*weights, 1.0]))
    return coded


def packed(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: str,
    rows: int,
    length: int,
    context_weight: float,
    phase: Phase = "main",
) -> Rows:
    """`rows` rows filled with whole documents, each put into the first of the open rows that has room."""
    stream = documents(seed, phase)
    done: list[list[tuple[list[int], list[float]]]] = []
    open_rows: list[tuple[int, list[tuple[list[int], list[float]]]]] = []
    while len(done) < rows:
        for item in encode(tokenizer, list(islice(stream, 500)), context_weight):
            size = len(item[0])
            if size > length:
                continue
            for index, (used, row) in enumerate(open_rows):
                if used + size <= length:
                    row.append(item)
                    open_rows[index] = (used + size, row)
                    break
            else:
                open_rows.append((size, [item]))
            if len(open_rows) > 24:
                fullest = max(range(len(open_rows)), key=lambda index: open_rows[index][0])
                done.append(open_rows.pop(fullest)[1])
    shape = (rows, length)
    out = Rows(
        torch.full(shape, tokenizer.pad_token_id),
        torch.zeros(shape),
        torch.full(shape, -1),
        torch.zeros(shape, dtype=torch.long),
    )
    for line, row in enumerate(done[:rows]):
        at = 0
        for number, (ids, weights) in enumerate(row):
            place = slice(at, at + len(ids))
            out.ids[line, place] = torch.tensor(ids)
            out.weights[line, place] = torch.tensor(weights)
            out.document[line, place] = number
            out.position[line, place] = torch.arange(len(ids))
            at += len(ids)
    return out
