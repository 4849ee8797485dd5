"""A tokenizer in a GGUF file, both ways: byte-level BPE ("gpt2") and SentencePiece BPE with byte fallback ("llama").

llama.cpp names the rule that cuts text before its pieces are merged ("tokenizer.ggml.pre"), and does not store it.
transformers (5.23) knows few of those names when it reads a file and cuts as GPT-2 does otherwise, so that SmolLM2 gets
other tokens for "a  5" than it was trained on. One table serves reading and writing here. What llama.cpp would cut
otherwise is refused, or returned as a note where only unusual text differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens (`tokenizer.ggml.token_type`)."""

_SPACE = "\u2581"
"""SentencePiece's mark for a space."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
        {**_BYTES, "use_regex": False},
    ]


_CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": _split(_CONTRACTIONS + r"\p{N}{1,3}" + _REST),
    "qwen2": _split(_CONTRACTIONS + r"\p{N}" + _REST),
}
"""llama.cpp's name of a cutting rule to the steps of the tokenizers library that do it."""

_ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "phi-2": "gpt-2", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2",
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "codeshell": "smollm",
}  # fmt: skip
"""Other names for the same rules, found in files."""

_WHOLE_PIECES = {"llama-bpe"}
"""Rules under which a piece that is a token is taken whole, whatever the merges say."""

_NO_MERGES = [f"{_SPACE} {_SPACE}"]
"""For a tokenizer of single bytes: a file cannot hold an empty list, and no text holds these two symbols."""

_SPECIALS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a file says of a tokenizer."""

    model: str
    """"gpt2" or "llama"."""
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    specials: dict[str, int]
    """llama.cpp's name ("bos", "eos", "unknown", "padding", "eot") to the id."""
    add_bos: bool
    add_eos: bool
    space_first: bool
    """Whether text gets a space before it."""
    chat_template: str | None
    notes: tuple[str, ...] = ()
    """Where llama.cpp's tokens differ from the tokenizer's, one sentence each."""

    def metadata(self) -> dict[str, Any]:
        """The keys and values of the file."""
        values: dict[str, Any] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.kinds,
            "tokenizer.ggml.scores": self.scores,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.add_bos_token": self.add_bos,
            "tokenizer.ggml.add_eos_token": self.add_eos,
            "tokenizer.ggml.add_space_prefix": self.space_first,
            "tokenizer.chat_template": self.chat_template,
        }
        values |= {f"tokenizer.ggml.{name}_token_id": index for name, index in self.specials.items()}
        return {key: value for key, value in values.items() if value is not None}


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, *, rows: int, ends: Sequence[int] = (), chat: bool | None = None
) -> Vocabulary:
    """The tokenizer as a file holds it.

    Args:
        tokenizer: the model's.
        rows: rows of the model's embedding; tokens behind them are left out, missing ones filled up.
        ends: further tokens at which an answer ends (a generation config's).
        chat: whether prompts come through the chat template (default: where there is one). It decides only for
            tokenizers that put a space before the first piece of text alone.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"The tokenizer {type(tokenizer).__name__} has no fast form; GGUF needs one.")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise _refusal(f"{setting}={model[setting]!r}")
    if model["type"] != "BPE":
        raise _refusal(f"a model of type {model['type']!r}")
    notes: list[str] = []
    merges = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    pre, space_first = "default", False
    if model["byte_fallback"]:
        space_first = _space_rule(
            parts, chat=bool(tokenizer.chat_template) if chat is None else chat, notes=notes
        )
    else:
        pre = _cutting_rule(parts, notes)
    tokens, kinds = _tokens(parts, rows, notes, byte_level=not model["byte_fallback"])
    add_bos, add_eos = _frame(tokenizer)
    specials = _special_ids(tokenizer, rows)
    if further := [end for end in ends if end != specials.get("eos")]:
        specials["eot"] = further[0]
    return Vocabulary(
        model="llama" if model["byte_fallback"] else "gpt2",
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        scores=_scores(merges, tokens, kinds) if model["byte_fallback"] else None,
        merges=None if model["byte_fallback"] else [" ".join(pair) for pair in merges] or _NO_MERGES,
        specials=specials,
        add_bos=add_bos,
        add_eos=add_eos,
        space_first=space_first,
        chat_template=_default_template(tokenizer),
        notes=tuple(notes),
    )


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _refusal(what: str) -> ModelError:
    return ModelError(
        f"The tokenizer has {what}, which llama.cpp has no counterpart for; serve the model from its own folder."
    )


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, without what does not change tokens."""
    if part is None:
        return []
    steps = part[inner] if part["type"] == "Sequence" else [part]
    return [{k: v for k, v in step.items() if k != "trim_offsets" and v is not None} for step in steps]


def _cutting_rule(parts: Mapping[str, Any], notes: list[str]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text."""
    for step in _steps(parts["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            raise _refusal(f"a normalizer of type {step['type']!r}")
        notes.append(
            "llama.cpp does not compose characters first (NFC), so decomposed accents get other tokens"
        )
    steps = [
        {key: value for key, value in step.items() if (key, value) != ("invert", False)}
        for step in _steps(parts["pre_tokenizer"], "pretokenizers")
    ]
    name = next((name for name, cuts in _CUTS.items() if cuts == steps), None)
    if name is None:
        raise _refusal(f"a rule that cuts text which is none of {', '.join(_CUTS)}")
    if bool(parts["model"].get("ignore_merges")) != (name in _WHOLE_PIECES):
        raise _refusal(f"ignore_merges={parts['model'].get('ignore_merges')!r} with the rule {name!r}")
    return name


def _space_rule(parts: Mapping[str, Any], *, chat: bool, notes: list[str]) -> bool:
    """Whether a SentencePiece-style tokenizer puts a space before text."""
    prepends = False
    replaces = False
    for step in _steps(parts["normalizer"], "normalizers"):
        if step == {"type": "Prepend", "prepend": _SPACE}:
            prepends = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
            replaces = True
        else:
            raise _refusal(f"a normalizer of type {step['type']!r}")
    for step in _steps(parts["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split" and step["pattern"] == {"String": " "} and replaces:
            continue  # Gemma's: its spaces are gone by then
        if step["type"] != "Metaspace" or step["replacement"] != _SPACE or step.get("split", True):
            raise _refusal(f"a pre-tokenizer of type {step['type']!r}")
        replaces = True
        scheme = step["prepend_scheme"]
        prepends = scheme == "always" or (scheme == "first" and not chat)
        if prepends:
            notes.append(
                "llama.cpp puts a space before text that begins with one too, this tokenizer does not"
            )
        if scheme == "first":
            notes.append(
                "made for prompts through the chat template: other text lacks the space before it"
                if chat
                else "made for plain prompts: text behind a special token gets a space before it"
            )
    if not replaces:
        raise _refusal("byte fallback without SentencePiece's spaces")
    return prepends


def _tokens(
    parts: Mapping[str, Any], rows: int, notes: list[str], *, byte_level: bool
) -> tuple[list[str], list[int]]:
    """Text and kind of each of the `rows` tokens."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    outside = []
    unknown = parts["model"].get("unk_token")
    for text, index in parts["model"]["vocab"].items():
        if index < rows:
            byte = not byte_level and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            tokens[index], kinds[index] = text, BYTE if byte else UNKNOWN if text == unknown else NORMAL
        else:
            outside.append(text)
    for token in parts["added_tokens"]:
        index, text = token["id"], token["content"]
        if any(token[flag] for flag in ("single_word", "lstrip", "rstrip")):
            notes.append(f"llama.cpp keeps the spaces around {text!r}, this tokenizer does not")
        if index < rows:
            tokens[index], kinds[index] = text, CONTROL if token["special"] else USER_DEFINED
        elif text not in outside:
            outside.append(text)
    if outside:
        notes.append(
            f"left out, as the model has no row for it: {', '.join(map(repr, outside[:3]))}"
            + (" and more" if outside[3:] else "")
        )
    return tokens, kinds


def _scores(merges: Sequence[tuple[str, ...]], tokens: Sequence[str], kinds: Sequence[int]) -> list[float]:
    """Scores under which llama.cpp makes the same merges: the first merged piece has the highest.

    Raises:
        ModelError: llama.cpp, which merges any two neighbours that make a token, would merge more or in another order.
    """
    order: dict[str, int] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        if piece != last and piece in order:
            raise _refusal("merges whose order no score of their results gives")
        order.setdefault(piece, len(order))
        last = piece
    listed = set(merges)
    known = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    for piece in known:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known and (left, right) not in listed:
                raise _refusal(f"the tokens {left!r}, {right!r} and {piece!r}, but no merge from two to one")
    return [-float(order.get(token, len(order))) for token in tokens]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text gets the begin token before it and the end token behind it."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_token_id] if bos else []
            if whole == [*before, *plain, *([tokenizer.eos_token_id] if eos else [])]:
                return bos, eos
    raise _refusal(f"the frame {tokenizer.convert_ids_to_tokens(whole)} around the text 'a'")


def _special_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{ours}_token_id", None) for ours, name in _SPECIALS.items()}
    return {name: int(index) for name, index in found.items() if index is not None and index < rows}


def tokenizer_of(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that a file describes, cutting text as llama.cpp does.

    Args:
        metadata: all keys that begin with "tokenizer.".

    Raises:
        ModelError: a kind of tokenizer, or a rule for cutting text, that this reader does not know.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    said = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    model = said.get("model")
    if model not in ("gpt2", "llama"):
        raise ModelError(f"its tokenizer is {model!r}, and gpt2 and llama are read; give the model's folder")
    tokens, kinds = said["tokens"], said.get("token_type") or []
    backend = _byte_level(said) if model == "gpt2" else _sentencepiece(said)
    added = [
        AddedToken(text, normalized=False, special=kind == CONTROL)
        for text, kind in zip(tokens, kinds, strict=False)
        if kind in (CONTROL, USER_DEFINED)
    ]
    special = [token for token in added if token.special]
    backend.add_special_tokens(special)
    backend.add_tokens([token for token in added if not token.special])
    named = {
        f"{ours}_token": tokens[said[f"{name}_token_id"]]
        for ours, name in _SPECIALS.items()
        if f"{name}_token_id" in said
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(said.get("add_bos_token", model == "llama" or said.get("pre") in _WHOLE_PIECES)),
        add_eos_token=bool(said.get("add_eos_token", False)),
        clean_up_tokenization_spaces=False,
        **named,
    )
    template = metadata.get("tokenizer.chat_template")
    tokenizer.chat_template = template or None
    return tokenizer


def _byte_level(said: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    pre = said.get("pre", "default")
    name = _ALIASES.get(pre, pre)
    if name not in _CUTS:
        known = ", ".join([*_CUTS, *_ALIASES])
        raise ModelError(
            f"its tokenizer cuts text by the rule {pre!r}, and {known} are read; give the model's folder"
        )
    vocab = {text: index for index, text in enumerate(said["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in said["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in _WHOLE_PIECES))
    parts = json.loads(backend.to_str())
    steps = [{**step, **({"invert": False} if step["type"] == "Split" else {})} for step in _CUTS[name]]
    steps = [{**step, **({"trim_offsets": True} if step["type"] == "ByteLevel" else {})} for step in steps]
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(said: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, kinds = said["tokens"], said.get("token_type") or [NORMAL] * len(said["tokens"])
    vocab = {text: index for index, text in enumerate(tokens)}
    mergeable = {text for text, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merges = _merges(vocab, mergeable, said["scores"])
    unknown = tokens[said["unknown_token_id"]] if "unknown_token_id" in said else None
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)
    )
    first = bool(said.get("add_space_prefix", True))
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if first else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if first else steps)
    return backend


def _merges(vocab: Mapping[str, int], mergeable: set[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best result first: what SentencePiece does by scores."""
    pairs = [
        (-scores[vocab[piece]], vocab[piece], cut, piece)
        for piece in mergeable
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return [(piece[:cut], piece[cut:]) for _, _, cut, piece in sorted(pairs)]
