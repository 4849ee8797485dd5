"""llama.cpp's server, anybody's or one in this process: the log-probabilities that it gives to chosen tokens.

The server of llama.cpp returns no log-probabilities of a prompt. It returns that of the token it samples, out of the
raw logits before any sampling rule, and a bias on one token makes it sample that one: so a continuation is asked for
token by token, each request one step further, with the prefix kept in the server's cache.
"""

from __future__ import annotations

import importlib
import json
import os
import urllib.error
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


class LlamaServer:
    """A running server of llama.cpp (`llama-server`, or `LlamaCpp` below)."""

    def __init__(self, address: str) -> None:
        """Name the server; nothing is sent yet.

        Args:
            address: "http://127.0.0.1:8080".
        """
        self.address = address.rstrip("/")

    def loras(self) -> list[str]:
        """Paths of the LoRA files that the server has loaded; requests name them by their place here."""
        found = self.send("/lora-adapters", None)
        return [str(each["path"]) for each in sorted(found, key=lambda each: int(each["id"]))]

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text, special tokens in it read as such.

        Args:
            text: any.
            special: whether the tokenizer adds its begin token.
        """
        body = {"content": text, "add_special": special, "parse_special": True}
        return list(self.send("/tokenize", body)["tokens"])

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that the file's chat template makes of messages."""
        return str(self.send("/apply-template", {"messages": list(messages)})["prompt"])

    def probabilities(
        self, prompt: Sequence[int], continuation: Sequence[int], *, lora: int | None = None
    ) -> list[TokenProbability]:
        """What the model says of each token of a continuation, those before it given (teacher-forced).

        Args:
            prompt: token ids, at least one.
            continuation: token ids.
            lora: place of the LoRA file that is applied; None: the bare model.

        Raises:
            ModelError: the server refuses, or cannot be reached.
        """
        scales = [{"id": index, "scale": float(index == lora)} for index in range(len(self.loras()))]
        found = []
        for place, token in enumerate(continuation):
            prefix = [*prompt, *continuation[:place]]
            said = self._ask(prefix, token, scales, n_probs=1)
            if said is None:
                # the token ends within a character, and of such the server tells nothing: ask for all tokens instead
                said = self._ask(prefix, self.tokens("a", special=False)[-1], scales, n_probs=_ALL)
            if said is None:
                raise ModelError(f"llama.cpp tells no log-probability of token {token}.")
            [logprob] = [each["logprob"] for each in (said, *said["top_logprobs"]) if each["id"] == token][:1]
            found.append(TokenProbability(token=token, logprob=logprob, best=said["top_logprobs"][0]["id"]))
        return found

    def _ask(self, prefix: list[int], token: int, scales: list[dict[str, float]], *, n_probs: int) -> Any:
        """What the server says of the token behind the prefix, which it is made to sample."""
        body = {
            "prompt": prefix,
            "n_predict": 1,
            "n_probs": n_probs,
            "temperature": 0.0,
            "logit_bias": [[token, _CERTAIN]],
            "cache_prompt": True,
            "lora": scales,
        }
        logprobs = self.send("/v1/completions", body)["choices"][0]["logprobs"]
        return logprobs["content"][0] if logprobs else None

    def send(self, path: str, body: dict[str, Any] | None) -> Any:
        """The answer to a request.

        Args:
            path: "/v1/chat/completions", ….
            body: what is posted; None: nothing, the path is got.

        Raises:
            ModelError: the server refuses, or cannot be reached.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read().decode(errors="replace")[:200]
            raise ModelError(
                f"The server at {self.address} refuses {path} ({error.code}: {reason})."
            ) from error
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The server at {self.address} does not answer ({error}); is it running?"
            ) from error


class LlamaCpp(LlamaServer):
    """A server in this process, on 127.0.0.1, for as long as the object lives.

    Give it a process of its own where a file may be damaged in ways that llama.cpp does not check: it then aborts.
    """

    def __init__(
        self,
        model: Path,
        loras: Sequence[Path] = (),
        *,
        context: int = 2048,
        slots: int = 1,
        threads: int | None = None,
        exact: bool = False,
    ) -> None:
        """Load the files.

        Args:
            model: a GGUF file.
            loras: LoRA files; a request takes one by its place in this list, or none.
            context: tokens of prompt and continuation together, over all slots.
            slots: requests that are worked on at the same time.
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
        parameters.n_parallel = slots
        # A request without "lora" is answered out of what an earlier request with one left in the cache: its field is
        # compared only where it is given. Our own requests give it, and ask for the cache themselves.
        parameters.cache_prompt = False
        parameters.warmup = False
        parameters.verbosity = -1
        count = threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = count
        if exact:
            wide = library.ggml_type.GGML_TYPE_F32
            parameters.cache_type_k = parameters.cache_type_v = wide
            parameters.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.lora_adapters = [library.CommonAdapterLoraInfo(str(file), 0.0) for file in loras]
        try:
            self._server: Any = library.Server(parameters)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"llama.cpp does not load {model} ({str(error).splitlines()[0]}).") from error
        super().__init__(str(self._server.listening_address))
