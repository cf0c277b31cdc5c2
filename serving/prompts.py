"""From a request's prompt, tokens or messages to token ids."""

from __future__ import annotations

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from registry.errors import InvalidRequest
from serving.protocol import GenerateRequest


class PromptReader:
    """Tokenises for one base.

    Args:
        tokenizer: the base's; used by one thread at a time.
        vocab_size: rows of the base's embedding.
        most_tokens: a longer prompt is refused, by its characters alone where these tell.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, most_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._most_tokens = most_tokens
        self._most_characters = most_tokens * max(map(len, tokenizer.get_vocab()))

    def read(self, request: GenerateRequest) -> tuple[int, ...]:
        """The prompt's token ids.

        Raises:
            InvalidRequest: it is empty, too long, not valid text, or not for this base.
        """
        if request.prompt_tokens is not None:
            tokens, param = self._checked(request.prompt_tokens), "prompt"
        elif request.prompt is not None:
            tokens, param = self._encoded(request.prompt, "prompt", special=True), "prompt"
        else:
            tokens, param = self._chat(request), "messages"
        if not tokens:
            raise InvalidRequest(
                "the prompt is empty, and this base puts no token before a text; give at least"
                " one token",
                param=param,
            )
        params = request.params
        named = {"logit_bias": [token for token, _ in params.logit_bias]}
        named["stop_token_ids"] = list(params.stop_token_ids)
        for param, ids in named.items():
            if (largest := max(ids, default=0)) >= self._vocab_size:
                raise InvalidRequest(
                    f"{param} names token {largest}; ids go from 0 to {self._vocab_size - 1}",
                    param=param,
                )
        return tokens

    def text(self, tokens: tuple[int, ...]) -> str:
        """What tokens say, special ones left out."""
        return str(
            self._tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _checked(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        for place, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < self._vocab_size:
                raise InvalidRequest(
                    f"prompt token {place} is {token!r}; ids go from 0 to {self._vocab_size - 1}",
                    param="prompt",
                )
        return tokens

    def _encoded(self, text: str, param: str, *, special: bool) -> tuple[int, ...]:
        if len(text) > self._most_characters:
            raise InvalidRequest(
                f"the prompt has {len(text)} characters, far more than {self._most_tokens} tokens;"
                " shorten it",
                param=param,
                code="context_length_exceeded",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the prompt is not valid Unicode: {error.reason} at character {error.start}",
                param=param,
            ) from error
        tokens = tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        if (largest := max(tokens, default=0)) >= self._vocab_size:
            name = self._tokenizer.convert_ids_to_tokens(largest)
            raise InvalidRequest(
                f"the prompt has {name!r}, token {largest} of the tokenizer, for which the base has"
                " no embedding; leave it out",
                param=param,
            )
        return tokens

    def _chat(self, request: GenerateRequest) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                f"base {request.version.base!r} has no chat template; use completions instead",
                param="messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in request.messages or ()],
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # a template raises whatever its author chose
            raise InvalidRequest(
                f"the base's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._encoded(str(text), "messages", special=False)
