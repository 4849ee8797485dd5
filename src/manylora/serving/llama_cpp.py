"""llama.cpp, run in this process through the xllamacpp package: the log-probabilities that it gives to chosen tokens.

The server of llama.cpp returns no log-probabilities of a prompt. It returns that of the token it samples, out of the
raw logits before any sampling rule, and a bias on one token makes it sample that one: so a continuation is asked for
token by token, each request one step further, with the prefix kept in the server's cache. The same requests work
against anybody's `llama-server` (POST /completions).
"""

from __future__ import annotations

import importlib
import json
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.errors import ConfigError, ModelError

_CERTAIN = 1e9
"""A bias that no difference of logits outweighs."""
_ALL = 1_000_000
"""More tokens than any vocabulary has."""


@dataclass(frozen=True, kw_only=True)
class TokenProbability:
    """What a model says of one token of a continuation."""

    token: int
    logprob: float
    """Natural logarithm, over the whole vocabulary."""
    best: int
    """The token with the largest probability there."""


class LlamaCpp:
    """A GGUF model with any number of LoRA files, answering on 127.0.0.1 for as long as the object lives."""

    def __init__(
        self,
        model: Path,
        loras: Sequence[Path] = (),
        *,
        context: int = 2048,
        threads: int | None = None,
        exact: bool = False,
    ) -> None:
        """Load the files.

        Args:
            model: a GGUF file.
            loras: LoRA files; a request takes one by its place in this list, or none.
            context: tokens of prompt and continuation together.
            threads: of the processor; default: `OMP_NUM_THREADS`, else all.
            exact: keep keys and values in float32; llama.cpp's own default is float16.

        Raises:
            ConfigError: xllamacpp is not installed.
            ModelError: llama.cpp does not load a file.
        """
        try:
            library = importlib.import_module("xllamacpp")
        except ImportError as error:
            raise ConfigError(
                "llama.cpp runs here through xllamacpp; install it: pip install xllamacpp."
            ) from error
        for file in (model, *loras):
            if not file.is_file():
                raise ModelError(f"{file} does not exist; give GGUF files.")
        parameters = library.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = -1
        count = threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = count
        if exact:
            wide = library.ggml_type.GGML_TYPE_F32
            parameters.cache_type_k = parameters.cache_type_v = wide
            parameters.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.lora_adapters = [library.CommonAdapterLoraInfo(str(file), 0.0) for file in loras]
        self._loras = len(loras)
        try:
            self._server: Any = library.Server(parameters)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"llama.cpp does not load {model} ({str(error).splitlines()[0]}).") from error
        self.address = str(self._server.listening_address)

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text, special tokens in it read as such.

        Args:
            text: any.
            special: whether the tokenizer adds its begin token.
        """
        return list(
            self._post("/tokenize", {"content": text, "add_special": special, "parse_special": True})[
                "tokens"
            ]
        )

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that the file's chat template makes of messages."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def probabilities(
        self, prompt: Sequence[int], continuation: Sequence[int], *, lora: int | None = None
    ) -> list[TokenProbability]:
        """What the model says of each token of a continuation, those before it given (teacher-forced).

        Args:
            prompt: token ids, at least one.
            continuation: token ids.
            lora: place of the LoRA file that is applied; None: the bare model.
        """
        scales = [{"id": index, "scale": float(index == lora)} for index in range(self._loras)]
        found = []
        for place, token in enumerate(continuation):
            prefix = [*prompt, *continuation[:place]]
            said = self._ask(prefix, token, scales, n_probs=1)
            if said is None:
                # the token ends within a character, and of such the server tells nothing: ask for all tokens instead
                said = self._ask(prefix, self._plain_token(), scales, n_probs=_ALL)
            if said is None:
                raise ModelError(f"llama.cpp tells no log-probability of token {token}.")
            [logprob] = [each["logprob"] for each in (said, *said["top_logprobs"]) if each["id"] == token][:1]
            found.append(TokenProbability(token=token, logprob=logprob, best=said["top_logprobs"][0]["id"]))
        return found

    def _ask(self, prefix: list[int], token: int, scales: list[dict[str, float]], *, n_probs: int) -> Any:
        """What the server says of the token behind the prefix, which it is made to sample."""
        answer = self._server.handle_completions(
            {
                "prompt": prefix,
                "n_predict": 1,
                "n_probs": n_probs,
                "temperature": 0.0,
                "logit_bias": [[token, _CERTAIN]],
                "cache_prompt": True,
                "lora": scales,
            }
        )
        if "choices" not in answer:
            raise ModelError(f"llama.cpp refuses a request ({answer.get('message', answer)}).")
        logprobs = answer["choices"][0]["logprobs"]
        return logprobs["content"][0] if logprobs else None

    def _plain_token(self) -> int:
        return self.tokens("a", special=False)[-1]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())
