"""Tokenizers of every kind of special tokens, made in memory: what ``tokenization.py`` sweeps over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = ["how do i bake a cake", "Tell me how to open a jar.", "Sure, here is how. yes", "如何烤蛋糕"]
_SAID = "how do i bake a cake be good sure here is yes no tell me hmm"
WORDS = [*_SAID.split(), "user", "assistant", "system", "<user>", "<asst>", "<sys>", "<end>"]


class Kind(NamedTuple):
    """One kind: how to make it, and what is known of it from how it was made.

    Args:
        make: a new tokenizer, as its user has it.
        bos: text of the BOS token that it names.
        adds: ids that it puts before a text; after: ids that it puts after one.
        beyond: how many of its tokens have no embedding, counted from the last.
    """

    make: Callable[[], Any]
    bos: str | None = None
    adds: int = 0
    after: int = 0
    beyond: int = 0


def _byte_backend(*specials: str, space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"vocab_size": 330, "special_tokens": list(specials), "show_progress": False}
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    return backend


def _around(backend: Tokenizer, single: str) -> Tokenizer:
    names = [word for word in single.split() if word != "$A"]
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, backend.token_to_id(name)) for name in names]
    )
    return backend


def _fast(backend: Tokenizer, **options: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def _bytes(single: str | None = None, space: Any = False, **options: Any) -> Callable[[], Any]:
    """A byte-level tokenizer with the special tokens that are named, and what stands around a text."""

    def make() -> Any:
        named = [value for value in options.values() if isinstance(value, str) and value.startswith(("<", "["))]
        others = [word for word in (single or "").split() if word != "$A"]
        backend = _byte_backend(*dict.fromkeys([*others, *named]), space=space)
        return _fast(_around(backend, single) if single else backend, **options)

    return make


def _beyond(**named: str) -> Callable[[], Any]:
    """A byte-level tokenizer whose special tokens were added after the model's embedding was made."""

    def make() -> Any:
        tokenizer = _fast(_byte_backend())
        tokenizer.add_special_tokens(named)
        return _fast(tokenizer.backend_tokenizer, **named)

    return make


def _pieces(fallback: bool) -> list[tuple[str, float]]:
    words = [f"▁{word}" for word in WORDS] + ["▁", *"abcdefghijklmnopqrstuvwxyzTS.,<>/|_\n"]
    rest = [f"<0x{i:02X}>" for i in range(256)] if fallback else []
    names = dict.fromkeys(["<unk>", "<s>", "</s>", *words, *rest])
    return [(name, -1.0 - i / 100) for i, name in enumerate(names)]


def _metaspace(backend: Tokenizer, scheme: str, fallback: bool) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps = [decoders.ByteFallback()] if fallback else []
    backend.decoder = decoders.Sequence([*steps, decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()])
    return backend


def _unigram(fallback: bool, single: str | None = None, scheme: str = "first", **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = models.Unigram(_pieces(fallback), unk_id=0, byte_fallback=fallback)
        backend = _metaspace(Tokenizer(model), scheme, fallback)
        backend.add_special_tokens(["<s>", "</s>"])
        return _fast(_around(backend, single) if single else backend, **options)

    return make


def _spaced_bpe(single: str | None = None, **options: Any) -> Callable[[], Any]:
    """Byte pairs over words with a prefix space, bytes where a character is unknown (Llama 2's kind)."""

    def make() -> Any:
        vocabulary = {name: i for i, (name, _) in enumerate(_pieces(True)) if len(name) == 1 or name.startswith("<")}
        vocabulary = {name: i for i, name in enumerate(vocabulary)}
        model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        backend = _metaspace(Tokenizer(model), "first", True)
        backend.add_special_tokens(["<s>", "</s>", "<unk>"])
        return _fast(_around(backend, single) if single else backend, **options)

    return make


def _word_backend(unknown: str | None, *specials: str) -> Tokenizer:
    names: list[str] = list(dict.fromkeys([*([unknown] if unknown else []), *specials, *WORDS]))
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown or "[none]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _words(unknown: str | None, *specials: str, **options: Any) -> Callable[[], Any]:
    return lambda: _fast(_word_backend(unknown, *specials), **options)


def _dropping() -> Any:
    """Byte pairs without bytes and without an unknown token: characters that it does not know vanish."""
    letters = [*"abcdefghijklmnopqrstuvwxyzTS.,", "▁", "<s>"]
    model = models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    return _fast(_metaspace(Tokenizer(model), "first", False), bos_token="<s>")


def _stripping() -> Any:
    """White space at the ends is taken off, also before a BOS token in the text."""
    backend = _around(_byte_backend("<s>", "</s>"), "<s> $A")
    backend.normalizer = normalizers.Strip()
    bos = AddedToken("<s>", lstrip=True, rstrip=False, special=True, normalized=False)
    backend.add_special_tokens([bos])
    return _fast(backend, bos_token=bos, eos_token="</s>")


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python, one token a byte: no character offsets."""

    def __init__(self, **options: Any) -> None:
        self.names = ["<s>", "</s>", *(f"{i:02x}" for i in range(256))]
        self.ids = {name: i for i, name in enumerate(self.names)}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.names)

    def get_vocab(self) -> dict[str, int]:
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [f"{byte:02x}" for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)  # None for one that a loader makes up

    def _convert_id_to_token(self, index: int) -> str:
        return self.names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(int(token, 16) for token in tokens if len(token) == 2).decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()


_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_BOTH = {"bos_token": "<s>", "eos_token": "</s>"}

KINDS: dict[str, Kind] = {
    "bytes; BOS added, EOS": Kind(_bytes("<s> $A", **_BOTH), "<s>", 1),
    "bytes; no special token": Kind(_bytes()),
    "bytes; EOS": Kind(_bytes(eos_token="</s>")),
    "bytes; EOS and PAD": Kind(_bytes(eos_token="</s>", pad_token="<pad>")),
    "bytes; BOS": Kind(_bytes(bos_token="<s>"), "<s>"),
    "bytes; BOS named, EOS": Kind(_bytes(**_BOTH), "<s>"),
    "bytes; BOS = EOS = UNK": Kind(_bytes(**_END, unk_token="<|endoftext|>"), "<|endoftext|>"),
    "bytes; BOS = EOS = PAD, padded left": Kind(
        _bytes(**_END, pad_token="<|endoftext|>", padding_side="left"), "<|endoftext|>"
    ),
    "bytes; PAD = BOS, EOS": Kind(_bytes(**_BOTH, pad_token="<s>"), "<s>"),
    "bytes; BOS and EOS added": Kind(_bytes("<s> $A </s>", **_BOTH), "<s>", 1, 1),
    "bytes; EOS added, no BOS": Kind(_bytes("$A </s>", eos_token="</s>"), None, 0, 1),
    "bytes; add_bos_token": Kind(_bytes(**_BOTH, add_bos_token=True), "<s>", 1),
    "bytes; add_bos_token, add_eos_token": Kind(
        _bytes(**_BOTH, add_bos_token=True, add_eos_token=True), "<s>", 1, 1
    ),
    "bytes; two tokens before": Kind(_bytes("[gMASK] <sop> $A", bos_token="<sop>", eos_token="</s>"), "<sop>", 2),
    "bytes; two tokens before, no BOS": Kind(_bytes("[gMASK] <sop> $A", eos_token="</s>"), None, 2),
    "bytes; prefix space": Kind(_bytes("<s> $A", space=True, **_BOTH), "<s>", 1),
    "bytes; BOS beyond the embedding": Kind(_beyond(bos_token="<s>"), None, beyond=1),
    "bytes; EOS beyond the embedding": Kind(_beyond(eos_token="</s>"), None, beyond=1),
    "bytes; white space stripped, BOS added": Kind(_stripping, "<s>", 1),
    "pairs; prefix space, BOS added": Kind(_spaced_bpe("<s> $A", unk_token="<unk>", **_BOTH), "<s>", 1),
    "pairs; prefix space, BOS named": Kind(_spaced_bpe(unk_token="<unk>", **_BOTH), "<s>"),
    "pairs; no UNK, no bytes": Kind(_dropping, "<s>"),
    "unigram; byte fallback, BOS added": Kind(_unigram(True, "<s> $A", unk_token="<unk>", **_BOTH), "<s>", 1),
    "unigram; UNK, BOS named": Kind(_unigram(False, unk_token="<unk>", **_BOTH), "<s>"),
    "unigram; UNK not named": Kind(_unigram(False, scheme="always", eos_token="</s>")),
    "words; UNK, BOS named, EOS": Kind(_words("<unk>", "<s>", "</s>", unk_token="<unk>", **_BOTH), "<s>"),
    "words; UNK = EOS": Kind(_words("</s>", unk_token="</s>", eos_token="</s>")),
    "words; no UNK": Kind(_words(None, "</s>", eos_token="</s>")),
    "slow; BOS named, EOS": Kind(lambda: Slow(**_BOTH), "<s>"),
    "slow; no special token": Kind(Slow),
}
